"""Normalises rows by their root mean square (RMSNorm, arXiv 1910.07467), as transformers' code rounds it.

`norm_casts.py` says what families compute. Backward keeps x and a number a row.
"""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.kernels.shared_constants import NORM_BLOCK, NORM_CASTS, NormCast

from ..backends import choose_backend
from ..device import device_facts
from ..eager_ops import eager_op
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext
from .kernels import by_kernels, layer_kernel, new_partials
from .norm_casts import check_norm, norm_backward_reference, norm_reference


def _norm_in_torch(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = norm_reference(x, weight, eps, cast)
    return y.contiguous(), rstd


def _norm_by_kernel(
    backend: str, x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = reused_empty(x.shape, x.dtype, x.device), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    weight = None if weight is None else weight.contiguous()
    layer_kernel("rms_norm", backend)(x, None, weight, eps, NORM_CASTS.index(cast), y, None, rstd)
    return y, rstd


_FORWARD = {"torch": _norm_in_torch, **by_kernels(_norm_by_kernel)}


@torch.library.custom_op("trl_fast::rms_norm", mutates_args=())
def rms_norm_and_rstd(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, cast: str, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the norm of x (..., H), and for each row what it was multiplied by, float32 (R,)."""
    return _FORWARD[choose_backend("rms_norm", backend, device_facts(x.device), x.dtype)](x, weight, eps, cast)


@rms_norm_and_rstd.register_fake
def _(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _backward_in_torch(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    cast: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    by_x, by_weight = norm_backward_reference(grad, x, weight, rstd, cast)
    if grad_sum is not None:
        by_x = by_x + grad_sum
    return by_x.contiguous() if needs_x else None, by_weight if needs_weight else None


def _backward_by_kernel(
    backend: str,
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    cast: str,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    grad_x = reused_empty(x.shape, x.dtype, x.device) if needs_x else None
    blocks = (len(rstd) + NORM_BLOCK - 1) // NORM_BLOCK
    partials = new_partials(backend, x, x.shape[-1], len(rstd), blocks) if needs_weight else None
    weight = None if weight is None else weight.contiguous()
    number = NORM_CASTS.index(cast)
    layer_kernel("rms_norm_backward", backend)(grad, grad_sum, x, weight, rstd, number, grad_x, partials)
    return grad_x, None if partials is None else partials.sum(0).to(x.dtype)


_BACKWARD = {"torch": _backward_in_torch, **by_kernels(_backward_by_kernel)}


@torch.library.custom_op("trl_fast::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    cast: str,
    needs_x: bool,
    needs_weight: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients by x (..., H) and weight (H,), each of no elements where it is not needed.

    grad: (..., H), by the norm; grad_sum: None, or what is added to the gradient by x; rstd: (R,), of the rows.
    """
    chosen = choose_backend("rms_norm", backend, device_facts(x.device), x.dtype)
    grads = _BACKWARD[chosen](grad, grad_sum, x, weight, rstd, cast, needs_x, needs_weight)
    by_x, by_weight = (x.new_empty(0) if by is None else by for by in grads)
    return by_x, by_weight


@rms_norm_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    cast: str,
    needs_x: bool,
    needs_weight: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs_x else 0), x.new_empty(x.shape[-1] if needs_weight else 0)


class _Context(AutogradContext):
    choices: tuple[str, str | None]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, *choices = inputs
    ctx.choices = (choices[0], choices[1])
    ctx.mark_non_differentiable(output[1])
    # No zeros are filled for what has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: _Context, grad: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    cast, backend = ctx.choices
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grads = rms_norm_backward(grad, None, x, weight, rstd, cast, needs_x, needs_weight, backend)
    return grads[0] if needs_x else None, grads[1] if needs_weight else None, None, None, None


rms_norm_and_rstd.register_autograd(_backward, setup_context=_setup_context)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    cast: NormCast = "llama",
    backend: str | None = None,
) -> torch.Tensor:
    """Divides rows by their root mean square and multiplies them by a weight.

    Args:
        x: (..., H), any float dtype and strides; weight: (H,), dtype of x, or None for none.
        eps: added to the mean of the squares.
        cast: where is rounded, a family of `norm_casts.py`: "llama" rounds to the dtype before the product with the
            weight, "olmo" after it, and "gemma" after that with 1 + weight.
        backend: one of `backends.BACKENDS`; None: the first that serves.

    Returns:
        (..., H), dtype of x, contiguous; differentiable by x and weight, once.

    Raises:
        ValueError: a shape, dtype or `cast` is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    check_norm(x, weight, cast)
    if op := eager_op("rms_norm", x, backend):
        return op(x, weight, eps, NORM_CASTS.index(cast))
    return rms_norm_and_rstd(x, weight, float(eps), cast, backend)[0]
