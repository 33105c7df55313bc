"""Normalises the residual stream and hands it on, with one gradient for both uses.

Autograd would add the norm's gradient by its input to that of the stream in a pass of its own. Here the stream goes on
from the norm's node of the graph, and the norm's backward adds what comes back along it in its pass.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import NORM_CASTS, NormCast

from ..eager_ops import eager_op
from ..named_gradients import AutogradContext, first_derivative
from .norm_casts import check_norm
from .rms_norm import rms_norm_and_rstd, rms_norm_backward


class _Context(AutogradContext):
    choices: tuple[str, str | None]


class _NormAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str, backend: str | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, rstd = rms_norm_and_rstd(x, weight, eps, cast, backend)
        ctx.choices = cast, backend
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        return y, x.view_as(x)

    @staticmethod
    @first_derivative("norm_and_residual")
    def backward(
        ctx: _Context, grad: torch.Tensor | None, grad_residual: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        by_x, by_weight = grad_residual, None
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if grad is not None:
            x, weight, rstd = ctx.saved_tensors
            cast, backend = ctx.choices
            by_x, by_weight = rms_norm_backward(
                grad, grad_residual, x, weight, rstd, cast, needs_x, needs_weight, backend
            )
        return by_x if needs_x else None, by_weight if needs_weight else None, None, None, None


def norm_and_residual(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: NormCast = "llama",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides rows by their root mean square as `rms_norm` does, and returns the rows themselves beside.

    Args:
        x, weight, eps, cast, backend: those of `rms_norm`.

    Returns:
        The norm (..., H), dtype of x, contiguous; and a view of x, not to be written to. Differentiable by x and
        weight, once.

    Raises:
        ValueError: a shape, dtype or `cast` is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    check_norm(x, weight, cast)
    if op := eager_op("rms_norm", x, backend, "norm_and_residual"):
        return op(x, weight, eps, NORM_CASTS.index(cast))
    y, residual = _NormAndResidual.apply(x, weight, float(eps), cast, backend)
    return y, residual
