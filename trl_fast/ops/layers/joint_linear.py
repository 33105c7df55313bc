"""Applies several linear layers to one input: queries, keys and values, or an MLP's gate and up.

Autograd would compute each layer's gradient by the input, and add them one by one. Here later products are summed into
the first one's result by the products themselves, which round once where a sum of its own rounds again. What layers
give is what they give alone, to the bit. Backward keeps x once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..device import device_facts
from ..linear import MIN_ROWS, linear
from ..matmul import add_mm, as_autocast, new_product
from ..named_gradients import AutogradContext, first_derivative


class _JointLinear(torch.autograd.Function):
    """Takes x (..., H), then weights (V, H), then as many biases (V,) or None."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *layers: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        weights, biases = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        trained = any(ctx.needs_input_grad[1 : 1 + len(weights)])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if trained else None, *(weights if ctx.needs_input_grad[0] else ()))
        rows = x.reshape(-1, x.shape[-1])
        own = device_facts(x.device).own_products and x.dtype == torch.float32 and len(rows) >= MIN_ROWS
        apply: Any = linear if own else F.linear
        made = [apply(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        # No views for autograd, as of `F.linear`: who gets them may write to them.
        return tuple(torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]]) for out in made)

    @staticmethod
    @first_derivative("joint_linear")
    def backward(ctx: AutogradContext, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        by_x: torch.Tensor | None = None
        by_layers: list[torch.Tensor | None] = [None] * len(needs)
        shape = None
        for at, grad in enumerate(grads):
            if grad is None:
                continue
            shape, grad = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
            if needs_x and by_x is None:
                by_x = new_product(grad, weights[at])
            elif by_x is not None:
                add_mm(by_x, grad, weights[at])
            if needs[at]:
                by_layers[at] = new_product(grad.t(), x.reshape(-1, x.shape[-1]))
            if needs[len(grads) + at]:
                by_layers[len(grads) + at] = grad.sum(0)
        return None if by_x is None or shape is None else by_x.view(*shape, by_x.shape[-1]), *by_layers


def joint_linear(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Computes x Wᵀ + b for each weight and bias, as `F.linear` does.

    Args:
        x: (..., H); weights: (V, H) each, biases: (V,) or None each: one float dtype. Under autocast each may have
            another dtype, none wider than float32.

    Returns:
        (..., V) each, dtype of x or of autocast, contiguous; differentiable by all tensors, once.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return joint_linear(
                as_autocast(x, dtype),
                [as_autocast(weight, dtype) for weight in weights],
                [None if bias is None else as_autocast(bias, dtype) for bias in biases],
            )
    if x.dim() < 1 or x.shape[-1] < 1 or len(weights) != len(biases):
        raise ValueError(f"x: expected (..., H), and as many biases as weights, got {tuple(x.shape)}, {len(biases)}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dtype != x.dtype or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weights: expected {x.dtype} of shape (V, {x.shape[-1]}), got {weight.dtype} {tuple(weight.shape)}"
            )
        if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
            raise ValueError(
                f"biases: expected {x.dtype} of shape {(len(weight),)}, got {bias.dtype} {tuple(bias.shape)}"
            )
    return _JointLinear.apply(x, *weights, *biases)
