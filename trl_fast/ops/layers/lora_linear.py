"""Applies a linear layer with a low-rank adapter (LoRA, arXiv 2106.09685): y = x Wᵀ + b + s (x Aᵀ) Bᵀ.

The adapter's part is summed into y, and into the gradient by x, by the matrix product that computes it, where PEFT
writes it out, scales it and adds it. So a sum of 16-bit numbers is rounded once; x Wᵀ + b and x Aᵀ are rounded as
PEFT rounds them. Backward keeps x and s x Aᵀ.

Under autocast all is computed in its dtype, as PEFT's layer is. x is cast once, where PEFT casts it to the adapter's
dtype and autocast casts both it and x back, each with a gradient that is cast and added.
"""

from __future__ import annotations

from typing import Any

import torch

from ..eager_ops import eager_linear
from ..matmul import add_mm, as_autocast, new_product
from ..memory_pool import reused_empty
from ..named_gradients import AutogradContext, gradients_of

_NAME = "trl_fast::lora_linear"


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns total + left @ right in the dtype of total; the factors may be float32 beside a narrower total."""
    if total.dtype == left.dtype:
        add_mm(total, left, right)
        return total
    upcast = reused_empty(total.shape, left.dtype, total.device).copy_(total)
    add_mm(upcast, left, right)
    return total.copy_(upcast)


@torch.library.custom_op(_NAME, mutates_args=())
def _lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    y = new_product(rows, weight.t(), bias)
    low = new_product(rows.to(lora_a.dtype), lora_a.t()).mul_(scaling)
    # No view for autograd: who gets it may write to it.
    shape = [*x.shape[:-1], weight.shape[0]]
    return torch.ops.aten._unsafe_view(_add_product(y, low, lora_b.t()), shape), low


@_lora_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lora_a: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), lora_a.new_empty(rows, lora_a.shape[0])


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=())
def _lora_linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Returns the gradients that are needed, of x, weight, bias, lora_a and lora_b, one after the other."""
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    upcast = grad.to(lora_b.dtype)
    by_low = new_product(upcast, lora_b).mul_(scaling)
    makes = (
        lambda: _add_product(new_product(grad, weight), by_low, lora_a).view(x.shape),
        lambda: new_product(grad.t(), rows),
        lambda: grad.sum(0),
        lambda: new_product(by_low.t(), rows.to(lora_a.dtype)),
        lambda: new_product(low.t(), upcast).t().contiguous(),
    )
    return [make() for make, needed in zip(makes, needs, strict=True) if needed]


@_lora_linear_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    like = (x, weight, weight[:, 0], lora_a, lora_b)
    return [t.new_empty(t.shape) for t, needed in zip(like, needs, strict=True) if needed]


class _Context(AutogradContext):
    scaling: float


_DIFFERENTIABLE = ("x", "weight", "bias", "lora_a", "lora_b")


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    # No zeros are filled for what has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1])


def _backward(ctx: _Context, grad: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
    x, weight, lora_a, lora_b, low = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    grads = _lora_linear_backward(grad, x, low, weight, lora_a, lora_b, ctx.scaling, needs)
    names = (name for name, needed in zip(_DIFFERENTIABLE, needs, strict=True) if needed)
    return gradients_of(_NAME, **dict(zip(names, grads, strict=True)))


_lora_linear.register_autograd(_backward, setup_context=_setup_context)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Computes x Wᵀ + b + scaling (x Aᵀ) Bᵀ.

    Args:
        x: (..., I), any strides; weight: (O, I); bias: (O,) or None: one float dtype.
        lora_a: (r, I); lora_b: (O, r): that dtype, or float32 beside 16 bits. Under autocast each may have another
            dtype, none wider than float32.
        scaling: usually alpha / r.

    Returns:
        (..., O), dtype of x or of autocast, contiguous; differentiable by all tensors, once.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if x.dim() < 1 or not x.is_floating_point() or x.shape[-1] < 1:
        raise ValueError(f"x: expected floats of shape (..., I), got {x.dtype} {tuple(x.shape)}")
    autocasts = torch.is_autocast_enabled(x.device.type)
    if (autocasts or x.dtype == lora_a.dtype) and (eager := eager_linear("lora_linear", x)) is not None:
        return eager(x, weight, bias, lora_a, lora_b, scaling)
    if autocasts:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, lora_a, lora_b = (as_autocast(tensor, dtype) for tensor in (x, weight, lora_a, lora_b))
        bias = None if bias is None else as_autocast(bias, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, lora_a, lora_b, scaling)
    inputs, outputs, rank = x.shape[-1], weight.shape[0], lora_a.shape[0]
    for name, tensor, shape, allowed in (
        ("weight", weight, (outputs, inputs), (x.dtype,)),
        ("bias", bias, (outputs,), (x.dtype,)),
        ("lora_a", lora_a, (rank, inputs), (x.dtype, torch.float32)),
        ("lora_b", lora_b, (outputs, rank), (x.dtype, torch.float32)),
    ):
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype not in allowed):
            raise ValueError(f"{name}: expected {allowed} of shape {shape}, got {tensor.dtype} {tensor.shape}")
    if lora_b.dtype != lora_a.dtype:
        raise ValueError(f"lora_b: expected {lora_a.dtype}, as lora_a has, got {lora_b.dtype}")
    return _lora_linear(x, weight, bias, lora_a, lora_b, float(scaling))[0]
