"""Normalises rows by their root mean square (RMSNorm, arXiv 1910.07467), as Llama's or Gemma's code rounds it.

With r = 1 / sqrt(mean(x²) + eps) in float32: Llama's result is weight · dtype(x r), Gemma's dtype(x r (1 + weight)).
Backward keeps x and r; with n = x r and g the gradient by n, the one by x is r (g - n mean(g n)).
"""

from __future__ import annotations

from typing import Literal

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext

# Rows whose gradients by the weight the C++ kernel sums into one row (kNormBlock of csrc/cpu/layer_kernels.h).
_ROWS_A_BLOCK = 64


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Returns (..., H) as (R, H) with contiguous rows."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()


def _forward_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    upcast = x.float()
    rstd = torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + eps)
    normed = upcast * rstd
    y = (normed * (1.0 + weight.float())).to(x.dtype) if is_gemma else weight * normed.to(x.dtype)
    return y, rstd.reshape(-1)


@torch.library.custom_op("trl_fast::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if choose_backend("rms_norm", backend, device_facts(x.device), x.dtype) == "torch":
        y, rstd = _forward_reference(x, weight, eps, is_gemma)
        return y.contiguous(), rstd
    rows = _rows(x)
    y, rstd = reused_empty(rows.shape, x.dtype, x.device), rows.new_empty(len(rows), dtype=torch.float32)
    torch.ops.trl_fast.layer_rms_norm(rows, weight.contiguous(), eps, is_gemma, y, rstd)
    return y.view(x.shape), rstd


@_rms_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, is_gemma: bool, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _backward_reference(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, is_gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = rstd.view(*x.shape[:-1], 1)
    normed = x.float() * rstd
    if is_gemma:
        by_normed, factor = grad.float() * (1.0 + weight.float()), normed
    else:
        by_normed, factor = (grad * weight).float(), normed.to(x.dtype).float()
    grad_x = (rstd * (by_normed - normed * (by_normed * normed).mean(-1, keepdim=True))).to(x.dtype)
    return grad_x, (grad.float() * factor).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


@torch.library.custom_op("trl_fast::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    is_gemma: bool,
    needs_x: bool,
    needs_weight: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    nothing = x.new_empty(0)
    if choose_backend("rms_norm", backend, device_facts(x.device), x.dtype) == "torch":
        by_x, by_weight = _backward_reference(grad, x, weight, rstd, is_gemma)
        return by_x.contiguous() if needs_x else nothing, by_weight if needs_weight else nothing.clone()
    rows = _rows(x)
    grad_x = reused_empty(rows.shape, x.dtype, x.device) if needs_x else None
    blocks = (len(rows) + _ROWS_A_BLOCK - 1) // _ROWS_A_BLOCK
    partials = rows.new_empty(blocks, x.shape[-1], dtype=torch.float32) if needs_weight else None
    torch.ops.trl_fast.layer_rms_norm_backward(
        _rows(grad), rows, weight.contiguous(), rstd, is_gemma, grad_x, partials
    )
    grad_weight = nothing.clone() if partials is None else partials.sum(0).to(weight.dtype)
    return nothing if grad_x is None else grad_x.view(x.shape), grad_weight


@_rms_norm_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    is_gemma: bool,
    needs_x: bool,
    needs_weight: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs_x else 0), weight.new_empty(weight.shape if needs_weight else 0)


class _Context(AutogradContext):
    is_gemma: bool
    backend: str | None


def _setup_context(
    ctx: _Context,
    inputs: tuple[torch.Tensor, torch.Tensor, float, bool, str | None],
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, weight, _, ctx.is_gemma, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: _Context, grad: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grads = _rms_norm_backward(grad, x, weight, rstd, ctx.is_gemma, needs_x, needs_weight, ctx.backend)
    return grads[0] if needs_x else None, grads[1] if needs_weight else None, None, None, None


_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    cast: Literal["llama", "gemma"] = "llama",
    backend: str | None = None,
) -> torch.Tensor:
    """Divides rows by their root mean square and multiplies them by a weight.

    Args:
        x: (..., H), any float dtype and strides; weight: (H,), dtype of x.
        eps: added to the mean of the squares.
        cast: "llama" rounds to the dtype before the product with the weight; "gemma" rounds once, after the product
            with 1 + weight.
        backend: "cpp" or "torch"; None: the first that serves.

    Returns:
        (..., H), dtype of x, contiguous; differentiable by x and weight, once.

    Raises:
        ValueError: a shape, dtype or `cast` is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    if cast not in ("llama", "gemma"):
        raise ValueError(f"cast: expected 'llama' or 'gemma', got {cast!r}")
    if x.dim() < 1 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype or not x.is_floating_point():
        raise ValueError(
            f"weight: expected {x.dtype} of shape {tuple(x.shape[-1:])}, as x has floats of, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    return _rms_norm(x, weight, float(eps), cast == "gemma", backend)[0]
