"""Computes functions whose plain forms lose digits: values, and derivatives in closed form where autograd's cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Takes tensors of one shape, float, and works element by element.
TensorFunction = Callable[..., torch.Tensor]

# Terms of the series of e^x − 1 − x where |x| < 1/2: enough for float32 and for float64.
_SERIES_TERMS = {torch.float64: 16}
_FLOAT32_TERMS = 8


class _WithDerivative(torch.autograd.Function):
    """Gives a function the derivative that goes with it. Both are functions of the same tensors."""

    @staticmethod
    def forward(function: TensorFunction, derivative: TensorFunction, *tensors: torch.Tensor) -> torch.Tensor:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.derivative, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Computed here, so that autograd sees how the derivative depends on x where it records this pass.
        others = [None] * (len(ctx.saved_tensors) - 1)
        return None, None, grad * ctx.derivative(*ctx.saved_tensors), *others

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        return tangents[2] * ctx.derivative(*ctx.saved_tensors)


def with_derivative(
    function: TensorFunction, derivative: TensorFunction, x: torch.Tensor, *constants: torch.Tensor
) -> torch.Tensor:
    """Returns function(x, *constants) with the derivative derivative(x, *constants) by x.

    x and the constants, which get no gradient, are of one shape, float; both functions work element by element. Second
    derivatives are autograd's of `derivative`; forward mode has the first.
    """
    return _WithDerivative.apply(function, derivative, x, *(constant.detach() for constant in constants))


def logistic(x: torch.Tensor) -> torch.Tensor:
    """Returns σ(x), any shape, with the derivative σ(x)·σ(−x).

    Autograd's derivative of a sigmoid is y·(1 − y): 0 from 17 on, where y is 1 in float32.
    """
    return with_derivative(torch.sigmoid, _logistic_derivative, x)


def _logistic_derivative(x: torch.Tensor) -> torch.Tensor:
    return logistic(x) * logistic(-x)


def expm1(x: torch.Tensor) -> torch.Tensor:
    """Returns e^x − 1, any shape, with the derivative e^x; autograd's is the value plus 1: 0 from −17 down."""
    return with_derivative(torch.expm1, torch.exp, x)


def exp_beyond_linear(x: torch.Tensor) -> torch.Tensor:
    """Returns e^x − 1 − x, any shape, without gradient; near 0, where the difference would cancel, by its series."""
    with torch.no_grad():
        series = torch.ones_like(x)
        for k in range(_SERIES_TERMS.get(x.dtype, _FLOAT32_TERMS), 2, -1):
            series = series * (x / k) + 1
        return torch.where(x.abs() < 0.5, 0.5 * x * x * series, torch.expm1(x) - x)
