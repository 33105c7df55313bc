"""Computes a linear layer of 16-bit numbers in float32, for a CPU that multiplies 16-bit numbers slowly.

Inputs, weights and results keep their dtype, and so do the tensors that backward needs. Products are exact and summed
in float32, then rounded once, as on hardware that has 16-bit products.
"""

from __future__ import annotations

import torch

from .matmul import product_dtype
from .named_gradients import AutogradContext

# Fewer rows than this: the time goes into reading the weight, which is then better not upcast.
MIN_ROWS = 4


def upcast_is_faster(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tells whether a product of `x` (..., H), taken in `dtype`, is faster with its numbers in float32."""
    upcast = product_dtype(dtype, x.device) != dtype
    return upcast and x.numel() >= MIN_ROWS * x.shape[-1]


@torch.library.custom_op("trl_fast::upcast_linear", mutates_args=())
def upcast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes `F.linear` with products in float32.

    Args:
        x: (..., H) bfloat16|float16; weight: (V, H), bias: (V,) of the same dtype.

    Returns:
        (..., V) of that dtype, differentiable.
    """
    upcast_bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), weight.float(), upcast_bias).to(x.dtype)


@upcast_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(
    ctx: AutogradContext, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], output: torch.Tensor
) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)


def _backward(ctx: AutogradContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    upcast = grad.float()
    rows = upcast.reshape(-1, grad.shape[-1])
    grad_x = (upcast @ weight.float()).to(grad.dtype) if needs_x else None
    grad_weight = (rows.t() @ x.reshape(len(rows), x.shape[-1]).float()).to(grad.dtype) if needs_weight else None
    return grad_x, grad_weight, rows.sum(dim=0).to(grad.dtype) if needs_bias else None


upcast_linear.register_autograd(_backward, setup_context=_setup_context)
