"""Computes a linear layer in float32, with numbers of 16 bits too: they are widened, and results rounded once.

That is for CPUs: those that multiply 16-bit numbers slowly, and those whose float32 products are ours (matmul.py).
Inputs, weights and results keep their dtype, and so do the tensors that backward needs. Products of 16-bit numbers are
exact and summed in float32, as on hardware that has such products.
"""

from __future__ import annotations

import torch

from .matmul import own_product_serves, product_dtype
from .memory_pool import reused_empty
from .named_gradients import AutogradContext

_NAME = "trl_fast::linear"
# Fewer rows than this: the time goes into reading the weight, which is then better not upcast.
MIN_ROWS = 4


def upcast_is_faster(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tells whether a product of `x` (..., H), taken in `dtype`, is faster with its numbers in float32."""
    upcast = product_dtype(dtype, x.device) != dtype
    return upcast and x.numel() >= MIN_ROWS * x.shape[-1]


def _product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns left @ right + bias, (R, C), summed in float32 and rounded once to the factors' dtype."""
    out = reused_empty((left.shape[0], right.shape[1]), left.dtype, left.device)
    if own_product_serves(out, left, right):
        if bias is not None:
            out.copy_(bias)
        torch.ops.trl_fast.product(left, right, out, bias is not None)
        return out
    dtype = torch.promote_types(left.dtype, torch.float32)
    # Autocast looks into an op in Python, and would multiply 16-bit numbers after all.
    with torch.autocast(left.device.type, enabled=False):
        upcast = torch.mm(left.to(dtype), right.to(dtype))
    return (upcast if bias is None else upcast.add_(bias)).to(left.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x (..., H) as (R, H)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


@torch.library.custom_op(_NAME, mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # No view for autograd, as of `F.linear`: who gets it may write to it.
    return torch.ops.aten._unsafe_view(_product(_rows(x), weight.t(), bias), [*x.shape[:-1], weight.shape[0]])


@_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op(f"{_NAME}_backward", mutates_args=())
def _linear_backward(
    grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None, needs_bias: bool
) -> list[torch.Tensor]:
    """Returns the gradients by the input, given the weight, by the weight, given x, and by the bias, where needed."""
    rows = _rows(grad)
    grads = []
    if weight is not None:
        grads.append(_product(rows, weight).view(*grad.shape[:-1], weight.shape[1]))
    if x is not None:
        grads.append(_product(rows.t(), _rows(x)))
    if needs_bias:
        grads.append(rows.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype))
    return grads


@_linear_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor | None, needs_bias: bool) -> list[torch.Tensor]:
    grads = [] if weight is None else [grad.new_empty(*grad.shape[:-1], weight.shape[1])]
    if x is not None:
        grads.append(grad.new_empty(grad.shape[-1], x.shape[-1]))
    return [*grads, *([grad.new_empty(grad.shape[-1])] if needs_bias else [])]


def _setup_context(
    ctx: AutogradContext, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], output: torch.Tensor
) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)


def _backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    grads = iter(_linear_backward(grad, x if needs_weight else None, weight if needs_x else None, needs_bias))
    return tuple(next(grads) if needed else None for needed in (needs_x, needs_weight, needs_bias))


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x Wᵀ + b as `F.linear` does, summed in float32 and rounded once.

    Args:
        x: (..., H); weight: (V, H); bias: (V,) or None: one dtype, float32, bfloat16 or float16. Any strides.

    Returns:
        (..., V) of that dtype, contiguous; differentiable by all three, once.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight: expected {x.dtype} of shape (V, H) for x {tuple(x.shape)}, "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias: expected {x.dtype} of shape {(len(weight),)}, got {bias.dtype} {tuple(bias.shape)}")
    return _linear(x, weight, bias)
