"""Turns queries and keys by their positions (rotary embeddings, arXiv 2104.09864), and keeps neither of them.

The halves (a, b) of a head become (a cos - b sin, b cos + a sin), each product and sum rounded to the dtype, as
transformers' `apply_rotary_pos_emb` does it. Backward is the transposed rotation of the gradients.
"""

from __future__ import annotations

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext


def _turn_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_backward: bool) -> torch.Tensor:
    cos, sin, half = cos[:, None], sin[:, None], x.shape[-1] // 2
    if is_backward:
        turned = x * sin
        return x * cos + torch.cat((turned[..., half:], -turned[..., :half]), dim=-1)
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    """Returns room for (B, heads, T, D), a view of a contiguous (B, T, heads, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _room_for(x: torch.Tensor) -> torch.Tensor:
    """Returns the same in memory of the pool, where there is much of it."""
    shape = x.shape[0], x.shape[2], x.shape[1], x.shape[3]
    return reused_empty(shape, x.dtype, x.device).transpose(1, 2)


@torch.library.custom_op("trl_fast::rotary", mutates_args=())
def _rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_backward: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = _room_for(query), _room_for(key)
    in_torch = choose_backend("rotary", backend, device_facts(query.device), query.dtype) == "torch"
    if not in_torch:
        cos, sin, query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin, query, key))
    for x, to in zip((query, key), out, strict=True):
        if in_torch:
            to.copy_(_turn_reference(x, cos, sin, is_backward))
        else:
            torch.ops.trl_fast.layer_rotary(x, cos, sin, is_backward, to)
    return out


@_rotary.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_backward: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(query), _empty_like(key)


class _Context(AutogradContext):
    choices: tuple[bool, str | None]


def _setup_context(
    ctx: _Context,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, str | None],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    _, _, cos, sin, is_backward, backend = inputs
    ctx.choices = (is_backward, backend)
    ctx.save_for_backward(cos, sin)


def _backward(ctx: _Context, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    is_backward, backend = ctx.choices
    return *_rotary(grad_query, grad_key, *ctx.saved_tensors, not is_backward, backend), None, None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns the two halves of each head by the angles of its position.

    Args:
        query, key: (B, heads, T, D), D even, any strides and float dtype; keys may have fewer heads.
        cos, sin: (B or 1, T, D), dtype of query, without gradient.
        backend: "cpp" or "torch"; None: the first that serves.

    Returns:
        Query and key turned, views of contiguous (B, T, heads, D); differentiable by both.

    Raises:
        ValueError: a shape or dtype is not as above, or cos or sin wants a gradient.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    if query.dim() != 4 or query.shape[-1] % 2 or not query.is_floating_point():
        raise ValueError(f"query: expected floats of shape (B, heads, T, even D), got {query.dtype} {query.shape}")
    batch, _, tokens, width = query.shape
    if key.dim() != 4 or key.dtype != query.dtype or (key.shape[0], *key.shape[2:]) != (batch, tokens, width):
        raise ValueError(
            f"key: expected {query.dtype} of shape ({batch}, heads, {tokens}, {width}), got {key.dtype} {key.shape}"
        )
    for name, turns in (("cos", cos), ("sin", sin)):
        shapes = (1, tokens, width), (batch, tokens, width)
        if tuple(turns.shape) not in shapes or turns.dtype != query.dtype or turns.requires_grad:
            raise ValueError(
                f"{name}: expected {query.dtype} of shape {shapes[0]} or {shapes[1]} without gradient, "
                f"got {turns.dtype} {tuple(turns.shape)}"
            )
    return _rotary(query, key, cos, sin, False, backend)
