"""Normalises queries and keys and turns them by their positions, in one pass: Qwen3's, Gemma 3's and OLMo's way.

`norm_casts.py` and `rotations.py` say what is computed. Backward keeps what it was given and a number a norm.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import NORM_CASTS, PAIRS, NormCast, Pairs

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..named_gradients import AutogradContext
from .head_norms import BACKWARD, FORWARD, new_rstd
from .rotations import check_angles, check_heads, empty_by_tokens


@torch.library.custom_op("trl_fast::qk_norm_rotary", mutates_args=())
def _qk_norm_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    cast: str,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = FORWARD[choose_backend("qk_norm_rotary", backend, device_facts(query.device), query.dtype)]
    given = (eps, cast, cos, sin, pairs, one_angle_a_pair, upcast)
    turned_query, query_rstd = run(query, query_weight, *given)
    turned_key, key_rstd = run(key, key_weight, *given)
    return turned_query, turned_key, query_rstd, key_rstd


@_qk_norm_rotary.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, *given: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rstds = new_rstd(query, query_weight), new_rstd(key, key_weight)
    return empty_by_tokens(query), empty_by_tokens(key), *rstds


@torch.library.custom_op("trl_fast::qk_norm_rotary_backward", mutates_args=())
def _qk_norm_rotary_backward(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    needs_weights: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    query_rstd: torch.Tensor,
    key_rstd: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cast: str,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    run = BACKWARD[choose_backend("qk_norm_rotary", backend, device_facts(query.device), query.dtype)]
    way = (cast, needs_weights, cos, sin, pairs, one_angle_a_pair, upcast)
    by_query, by_query_weight = run(grad_query, query, query_weight, query_rstd, *way)
    by_key, by_key_weight = run(grad_key, key, key_weight, key_rstd, *way)
    first, second = (query.new_empty(0) if by is None else by for by in (by_query_weight, by_key_weight))
    return by_query, by_key, first, second


@_qk_norm_rotary_backward.register_fake
def _(
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    needs_weights: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second = (query.new_empty(weight.shape if needs_weights else 0) for weight in (query_weight, key_weight))
    return empty_by_tokens(query), empty_by_tokens(key), first, second


class _Context(AutogradContext):
    choices: tuple[Any, ...]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, cos, sin, _, cast, pairs, one_angle_a_pair, upcast, backend = inputs
    ctx.choices = (cast, pairs, one_angle_a_pair, upcast, backend)
    rstds = output[2:]
    ctx.mark_non_differentiable(*rstds)
    # No zeros are filled for what has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *rstds, cos, sin)


def _backward(
    ctx: _Context, grad_query: torch.Tensor | None, grad_key: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    cast, *way = ctx.choices
    needs = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors
    by_query, by_key = (
        torch.zeros_like(x) if grad is None else grad for x, grad in zip(saved, (grad_query, grad_key), strict=False)
    )
    grads = _qk_norm_rotary_backward(by_query, by_key, needs[2] or needs[3], *saved, cast, *way)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 8


_qk_norm_rotary.register_autograd(_backward, setup_context=_setup_context)


def qk_norm_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    cast: NormCast = "llama",
    pairs: Pairs = "halves",
    one_angle_a_pair: bool = False,
    upcast: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides heads by their root mean square, multiplies them by a weight, and turns them.

    Args:
        query, key: (B, heads, T, D), any strides and float dtype; keys may have fewer heads.
        query_weight, key_weight: (D,), a norm a head (Qwen3, Gemma 3), or (heads · D,), one of all heads (OLMo 2);
            dtype of query.
        eps, cast: those of `rms_norm`.
        cos, sin, pairs, one_angle_a_pair, upcast, backend: those of `rotary`.

    Returns:
        Query and key, views of contiguous (B, T, heads, D); differentiable by query, key and the weights, once.

    Raises:
        ValueError: a shape, dtype or name is not as above, or cos or sin wants a gradient.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    if cast not in NORM_CASTS:
        raise ValueError(f"cast: unknown name {cast!r}; expected one of {NORM_CASTS}")
    check_heads(query, key)
    check_angles(query, cos, sin, pairs, one_angle_a_pair, upcast)
    for name, weight, x in (("query_weight", query_weight, query), ("key_weight", key_weight, key)):
        lengths = x.shape[3], x.shape[1] * x.shape[3]
        if weight.dim() != 1 or len(weight) not in lengths or len(weight) == 0 or weight.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {x.dtype} of shape ({lengths[0]},) or ({lengths[1]},), "
                f"got {weight.dtype} {tuple(weight.shape)}"
            )
    if op := eager_op("qk_norm_rotary", query, backend):
        numbers = (eps, NORM_CASTS.index(cast), PAIRS.index(pairs), one_angle_a_pair, upcast)
        return op(query, key, query_weight, key_weight, cos, sin, *numbers)
    way = (float(eps), cast, pairs, one_angle_a_pair, upcast, backend)
    return _qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, *way)[:2]
