"""Computes functions whose plain forms lose digits: values, and derivatives in closed form where autograd's cancel."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Terms of the series of e^x − 1 − x where |x| < 1/2: enough for float32 and for float64.
_SERIES_TERMS = {torch.float64: 16}
_FLOAT32_TERMS = 8


class _WithDerivative(torch.autograd.Function):
    """Gives a value the derivative that goes with it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, derivative: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(derivative)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return grad * derivative, None, None


def with_derivative(x: torch.Tensor, value: torch.Tensor, derivative: torch.Tensor) -> torch.Tensor:
    """Returns `value`, a function of x with the derivative `derivative`; all of one shape, float."""
    return _WithDerivative.apply(x, value.detach(), derivative.detach())


def logistic(x: torch.Tensor) -> torch.Tensor:
    """Returns σ(x), any shape, with the derivative σ(x)·σ(−x).

    Autograd's derivative of a sigmoid is y·(1 − y): 0 from 17 on, where y is 1 in float32.
    """
    with torch.no_grad():
        value = torch.sigmoid(x)
        derivative = value * torch.sigmoid(-x)
    return with_derivative(x, value, derivative)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """Returns e^x − 1, any shape, with the derivative e^x; autograd's is the value plus 1: 0 from −17 down."""
    with torch.no_grad():
        value, derivative = torch.expm1(x), x.exp()
    return with_derivative(x, value, derivative)


def exp_beyond_linear(x: torch.Tensor) -> torch.Tensor:
    """Returns e^x − 1 − x, any shape, without gradient; near 0, where the difference would cancel, by its series."""
    with torch.no_grad():
        series = torch.ones_like(x)
        for k in range(_SERIES_TERMS.get(x.dtype, _FLOAT32_TERMS), 2, -1):
            series = series * (x / k) + 1
        return torch.where(x.abs() < 0.5, 0.5 * x * x * series, torch.expm1(x) - x)
