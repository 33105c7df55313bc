"""Holds the exponentials and hyperbolic tangents inside the row kernels of every backend to float64."""

from __future__ import annotations

import torch

from trl_fast.ops.head.row_kernels import RowKernels
from trl_fast.ops.head.row_statistics import TARGET
from trl_fast.ops.head.sweep import new_state

SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])


def _gradient(kernels: RowKernels, logits: torch.Tensor, softcap: float, a: float, d: float, e: float) -> torch.Tensor:
    """The gradient of one row, in a copy, with lse 0, b 0, and its target in the first column."""
    coefficients = torch.tensor([[a], [0.0], [d], [e]])
    given = (logits[None].clone(), torch.zeros(1, dtype=torch.int64), None, 1.0, softcap, 1.0)
    out = torch.full_like(given[0], float("nan"))
    kernels.grad(*given, torch.zeros(1), coefficients, 0, out)
    return out[0]


def check_exponential(kernels: RowKernels) -> None:
    """From 0 down to the end of the normal numbers to a few units in the last place; 0 below, NaN and infinities."""
    x = torch.cat((torch.zeros(1), -torch.logspace(-7, 1.94, 3000), torch.tensor([-104.0, -1e4, -3e38]), SPECIAL[2:3]))
    found = _gradient(kernels, torch.cat((x[:1], x)), 0.0, a=1.0, d=0.0, e=0.0)[1:].double()
    exact = x.double().exp()
    # x · log2(e) is rounded where an exponential is a power of two.
    assert ((found - exact).abs() <= (4e-7 + 1.3e-7 * x.double().abs().clamp(max=90)) * exact + 1.2e-38).all()
    assert _gradient(kernels, SPECIAL[[3, 0]], 0.0, a=1.0, d=0.0, e=0.0)[1].isnan()


def check_tanh(kernels: RowKernels, largest: float = 35.0) -> None:
    """Values and derivatives from 1e-30 to `largest`, where the derivative ends, number by number; NaN, infinities."""
    size = torch.cat((torch.logspace(-30, -4, 60), torch.logspace(-4, 1.54, 2000)))
    size = size[size <= largest]
    cap = 8.0  # a power of two: x is exact
    x = torch.cat((size, -size)) * cap
    derivative = torch.cosh(x.double() / cap) ** -2
    for first, out in ((0.0, 1.0), (2.5, 2.5)):
        logits = torch.cat((torch.tensor([first]), x))
        found = _gradient(kernels, logits, cap, a=0.0, d=out, e=1.0).double()
        tolerance = 1e-6 + 5e-7 * (x.double() / cap).abs()
        assert ((found[1:] - derivative).abs() <= tolerance * derivative).all()
        assert abs(found[0] / out * torch.cosh(torch.tensor(first / cap, dtype=torch.float64)) ** 2 - 1) < 1e-6
    x = x[::16]  # every row is a program of its own
    values = _values(kernels, x, cap)
    exact = cap * torch.tanh(x.double() / cap)
    assert ((values - exact).abs() <= 6e-7 * exact.abs()).all()
    assert _values(kernels, SPECIAL, cap).nan_to_num(nan=7.0).tolist() == [7.0, cap, -cap, 0.0, 0.0]


def _values(kernels: RowKernels, x: torch.Tensor, softcap: float) -> torch.Tensor:
    """The capped logits of rows of one column, which is the target."""
    state = new_state(len(x), x.device)
    targets = torch.zeros(len(x), dtype=torch.int64)
    kernels.scores(x[:, None].contiguous(), targets, None, 1.0, softcap, 1.0, 0, 0, state)
    return state[TARGET]
