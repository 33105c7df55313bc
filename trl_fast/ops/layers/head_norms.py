"""Normalises heads and turns them: what each backend runs for queries, and again for keys.

Heads are x (B, heads, T, D). A norm has the length of its weight: D, one a head, or heads · D, one a token.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import NORM_CASTS, PAIRS, TOKEN_BLOCK

from .kernels import by_kernels, layer_kernel, new_partials
from .norm_casts import norm_backward_reference, norm_reference
from .rotations import room_by_tokens, turn_reference, with_contiguous_rows


def _by_norms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns (B, heads, T, D) as (B, T, norms, H), H being the weight's length."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], _norms(x, weight), len(weight))


def _by_heads(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns (B, T, norms, H) in the shape of x, (B, heads, T, D)."""
    return rows.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _norms(x: torch.Tensor, weight: torch.Tensor) -> int:
    """Returns the norms of a token: one a head, or one of all heads if the weight is as long as they."""
    return x.shape[1] * x.shape[3] // len(weight)


def new_rstd(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns room for a float32 number a norm of x (B, heads, T, D), of the weight (H,)."""
    return x.new_empty(x.shape[0] * x.shape[2] * _norms(x, weight), dtype=torch.float32)


def _forward_in_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cast: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, rstd = norm_reference(_by_norms(x, weight), weight, eps, cast)
    turned = turn_reference(_by_heads(normed, x), cos, sin, pairs, one_angle_a_pair, upcast, False)
    return room_by_tokens(x).copy_(turned), rstd


def _side_by_side(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns x so that what has one norm lies in one piece: a copy where it does not."""
    heads, width = x.shape[1], x.shape[3]
    if x.stride(3) == 1 and (len(weight) == width or heads == 1 or x.stride(1) == width):
        return x
    # An empty tensor counts as contiguous whatever its strides.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _has_kernel(backend: str, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Tells whether one kernel normalises and turns; those on GPUs have no norm of all heads of a token."""
    return backend == "cpp" or len(weight) == x.shape[3]


def _forward_by_kernel(
    backend: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cast: str,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *way: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, rstd = room_by_tokens(x), new_rstd(x, weight)
    turn = (*with_contiguous_rows(cos, sin), PAIRS.index(way[0]), *way[1:])
    x, weight, number = _side_by_side(x, weight), weight.contiguous(), NORM_CASTS.index(cast)
    if _has_kernel(backend, x, weight):
        layer_kernel("norm_rotary", backend)(x, weight, eps, number, *turn, out, rstd)
    else:
        rows = _by_norms(x, weight)
        normed = torch.empty_like(rows)
        layer_kernel("rms_norm", backend)(rows, None, weight, eps, number, normed, None, rstd)
        layer_kernel("rotary", backend)(_by_heads(normed, x), *turn, False, out)
    return out, rstd


def _backward_in_torch(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    cast: str,
    needs_weight: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: str,
    one_angle_a_pair: bool,
    upcast: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    turned_back = turn_reference(grad, cos, sin, pairs, one_angle_a_pair, upcast, True)
    by_normed = _by_norms(turned_back, weight)
    by_x, by_weight = norm_backward_reference(by_normed, _by_norms(x, weight), weight, rstd, cast)
    return room_by_tokens(x).copy_(_by_heads(by_x, x)), by_weight if needs_weight else None


def _backward_by_kernel(
    backend: str,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    cast: str,
    needs_weight: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *way: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = room_by_tokens(x)
    blocks = (x.shape[0] * x.shape[2] + TOKEN_BLOCK - 1) // TOKEN_BLOCK
    partials = new_partials(backend, x, len(weight), len(rstd), blocks) if needs_weight else None
    grad, *angles = with_contiguous_rows(grad, cos, sin)
    turn = (*angles, PAIRS.index(way[0]), *way[1:])
    x, weight, number = _side_by_side(x, weight), weight.contiguous(), NORM_CASTS.index(cast)
    if _has_kernel(backend, x, weight):
        layer_kernel("norm_rotary_backward", backend)(grad, x, weight, rstd, number, *turn, out, partials)
    else:
        turned = room_by_tokens(x)
        layer_kernel("rotary", backend)(grad, *turn, True, turned)
        rows = (_by_norms(turned, weight), None, _by_norms(x, weight))
        by_rows = _by_norms(out, weight)
        layer_kernel("rms_norm_backward", backend)(*rows, weight, rstd, number, by_rows, partials)
    return out, None if partials is None else partials.sum(0).to(x.dtype)


# By backend: (x, weight, eps, cast, cos, sin, pairs, one_angle_a_pair, upcast) to the heads and rstd; and
# (grad, x, weight, rstd, cast, needs_weight, cos, sin, pairs, one_angle_a_pair, upcast) to the gradients.
FORWARD = {"torch": _forward_in_torch, **by_kernels(_forward_by_kernel)}
BACKWARD = {"torch": _backward_in_torch, **by_kernels(_backward_by_kernel)}
