"""Operations of matrix products and attention, by the shapes of their operands. All else is counted in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Operations(NamedTuple):
    """Floating-point operations, whether their operands are wider than 16 bits, and a product's two factors."""

    flops: float
    wide: bool = False
    factors: tuple[torch.Tensor, ...] = ()


def flops_of(func: torch._ops.OpOverload, given: dict[str, Any]) -> Operations:
    """The operations of an operator, given its arguments by name; none for what is no product."""
    formula = _FORMULAS.get(func.overloadpacket)
    return Operations(0.0) if formula is None else formula(given)


def _product(left: str, right: str) -> Callable[[dict[str, Any]], Operations]:
    """(..., M, K) times (..., K, N): two operations an element of M, N and K."""

    def operations(given: dict[str, Any]) -> Operations:
        factors = (given[left], given[right])
        return Operations(2.0 * factors[0].numel() * factors[1].shape[-1], factors[0].dtype.itemsize > 2, factors)

    return operations


_FORMULAS = {
    aten.mm: _product("self", "mat2"),
    aten.bmm: _product("self", "mat2"),
    aten.addmm: _product("mat1", "mat2"),
    aten.addmm_: _product("mat1", "mat2"),
    aten.baddbmm: _product("batch1", "batch2"),
    aten.baddbmm_: _product("batch1", "batch2"),
}
