"""Turns queries and keys by their positions (rotary embeddings, arXiv 2104.09864), and keeps neither of them.

`rotations.py` says which ways there are, and where is rounded.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import PAIRS, Pairs

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..named_gradients import AutogradContext
from .kernels import by_kernels, layer_kernel
from .rotations import check_angles, check_heads, empty_by_tokens, room_by_tokens, turn_reference, with_contiguous_rows


def _in_torch(x: torch.Tensor, *rotation: Any) -> torch.Tensor:
    return room_by_tokens(x).copy_(turn_reference(x, *rotation))


def _by_kernel(
    backend: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
    is_backward: bool,
) -> torch.Tensor:
    out = room_by_tokens(x)
    number = PAIRS.index(pairs)
    given = with_contiguous_rows(x, cos, sin)
    layer_kernel("rotary", backend)(*given, number, one_angle_a_pair, upcast, is_backward, out)
    return out


_TURN = {"torch": _in_torch, **by_kernels(_by_kernel)}


@torch.library.custom_op("trl_fast::rotary", mutates_args=())
def _rotary(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
    is_backward: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    turn = _TURN[choose_backend("rotary", backend, device_facts(query.device), query.dtype)]
    rotation = (cos, sin, pairs, one_angle_a_pair, upcast, is_backward)
    return turn(query, *rotation), query.new_empty(0) if key is None else turn(key, *rotation)


@_rotary.register_fake
def _(query: torch.Tensor, key: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_by_tokens(query), query.new_empty(0) if key is None else empty_by_tokens(key)


class _Context(AutogradContext):
    choices: tuple[Any, ...]
    has_key: bool


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, key, cos, sin, *choices = inputs
    ctx.choices, ctx.has_key = tuple(choices), key is not None
    ctx.save_for_backward(cos, sin)


def _backward(ctx: _Context, grad_query: torch.Tensor, grad_key: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *choices, is_backward, backend = ctx.choices
    grads = (grad_query, grad_key if ctx.has_key else None)
    by_query, by_key = _rotary(*grads, *ctx.saved_tensors, *choices, not is_backward, backend)
    return by_query, by_key if ctx.has_key else None, *(None,) * 7


_rotary.register_autograd(_backward, setup_context=_setup_context)


def rotary(
    query: torch.Tensor,
    key: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    pairs: Pairs = "halves",
    one_angle_a_pair: bool = False,
    upcast: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turns the first R numbers of each head by the angles of its position; the others pass.

    Positions of several kinds (M-RoPE) are chosen where transformers computes cos and sin.

    Args:
        query, key: (B, heads, T, D), any strides and float dtype; keys may have fewer heads, and may be None.
        cos, sin: (B or 1, T, R), R even and at most D, dtype of query, without gradient.
        pairs: which numbers are turned together: "halves", i and i + R / 2 (Llama); "adjacent", 2 i and 2 i + 1 (GLM,
            Cohere, ERNIE); "adjacent_to_halves", these, and they come out as halves (DeepSeek-V3).
        one_angle_a_pair: cos and sin are (B or 1, T, R / 2).
        upcast: computes in float32 and rounds once (Cohere, OLMo); cos and sin may then be float32.
        backend: one of `backends.BACKENDS`; None: the first that serves.

    Returns:
        Query and key turned (None without key), views of contiguous (B, T, heads, D); differentiable by both.

    Raises:
        ValueError: a shape or dtype is not as above, or cos or sin wants a gradient.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    check_heads(query, key)
    check_angles(query, cos, sin, pairs, one_angle_a_pair, upcast)
    if op := eager_op("rotary", query, backend):
        return op(query, key, cos, sin, PAIRS.index(pairs), one_angle_a_pair, upcast)
    turned = _rotary(query, key, cos, sin, pairs, one_angle_a_pair, upcast, False, backend)
    return turned[0], None if key is None else turned[1]
