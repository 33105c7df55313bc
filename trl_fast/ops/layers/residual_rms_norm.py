"""Adds a layer's result to the residual stream and normalises the sum, in one pass.

Backward takes the gradients of both and adds them in its pass; the sum, which is there anyway, and a number a row are
kept. `norm_casts.py` says what families compute.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import NORM_CASTS, NormCast

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext
from .kernels import by_kernels, layer_kernel
from .norm_casts import check_norm, norm_reference
from .rms_norm import rms_norm_backward


def _in_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = (residual + x).contiguous()
    y, rstd = norm_reference(total, weight, eps, cast)
    return y, total, rstd


def _by_kernel(
    backend: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, total = (reused_empty(x.shape, x.dtype, x.device) for _ in range(2))
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    layer_kernel("rms_norm", backend)(x, residual, weight, eps, NORM_CASTS.index(cast), y, total, rstd)
    return y, total, rstd


_FORWARD = {"torch": _in_torch, **by_kernels(_by_kernel)}


@torch.library.custom_op("trl_fast::residual_rms_norm", mutates_args=())
def _residual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    cast: str,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = choose_backend("residual_rms_norm", backend, device_facts(x.device), x.dtype)
    return _FORWARD[chosen](x, residual, weight, eps, cast)


@_residual_rms_norm.register_fake
def _(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


class _Context(AutogradContext):
    choices: tuple[str, str | None]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, _, *choices = inputs
    ctx.choices = (choices[0], choices[1])
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    # Of a result that nothing follows, as the sum behind the last layer, there are no zeros to be added.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, rstd)


def _backward(
    ctx: _Context, grad: torch.Tensor | None, grad_sum: torch.Tensor | None, _: object
) -> tuple[torch.Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    cast, backend = ctx.choices
    needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
    by_sum, by_weight = grad_sum, None
    if grad is not None:
        needs_sum = needs_x or needs_residual
        by_sum, by_weight = rms_norm_backward(
            grad, grad_sum, total, weight, rstd, cast, needs_sum, needs_weight, backend
        )
    return (
        by_sum if needs_x else None,
        by_sum if needs_residual else None,
        by_weight if needs_weight else None,
        *(None, None, None),
    )


_residual_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def residual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: NormCast = "llama",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds x to the residual and divides the rows of the sum by their root mean square.

    Args:
        x, residual: (..., H), any float dtype, one for both, and any strides.
        weight, eps, cast, backend: those of `rms_norm`.

    Returns:
        The norm of the sum, and the sum, rounded to the dtype before it is normalised: (..., H), dtype of x,
        contiguous; differentiable by x, residual and weight, once.

    Raises:
        ValueError: a shape, dtype or `cast` is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    check_norm(x, weight, cast)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: expected {x.dtype} of shape {tuple(x.shape)}, as x has them, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    if op := eager_op("residual_rms_norm", x, backend):
        return op(x, residual, weight, eps, NORM_CASTS.index(cast))
    normed, total, _ = _residual_rms_norm(x, residual, weight, float(eps), cast, backend)
    return normed, total
