"""Adds LoRA adapters to a head's weight for a pass, and sums their factors' gradients a vocabulary tile at a time.

W + s·B·A is a matrix as large as W, and so is its gradient. Neither is kept: the sum is made anew for the backward
pass, and of its gradient G only what the factors need is summed, dB = s·G·Aᵀ and dA = s·Bᵀ·G (LoRA, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..matmul import add_mm, mm_into
from .transient_weight import piece_numbers


class LowRankFactors(NamedTuple):
    """Holds an adapter: down (r, H) and up (V, r), of one float dtype, and the factor of their product."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns weight + scale · up · down, (V, H) in the weight's dtype.

        It is the same in forward and backward, whatever autocast says.
        """
        with torch.autocast(weight.device.type, enabled=False):
            if self.up.dtype == weight.dtype and weight.device.type != "cpu":
                return torch.addmm(weight, self.up, self.down, alpha=self.scale)
            # Products of 16-bit numbers are slow on a CPU.
            dtype = torch.promote_types(self.up.dtype, torch.float32)
            factors = (self.up.to(dtype), self.down.to(dtype))
            return torch.addmm(weight.to(dtype), *factors, alpha=self.scale).to(weight.dtype)


@dataclass(frozen=True, eq=False)
class LowRankWeight:
    """Is a frozen weight (V, H) with adapters added to it."""

    weight: torch.Tensor
    adapters: Sequence[LowRankFactors]

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Returns the factors, down (r, H) and up (V, r) of one adapter after the other."""
        return tuple(factor for adapter in self.adapters for factor in (adapter.down, adapter.up))

    def whole(self) -> torch.Tensor:
        """Returns the sum (V, H), in the weight's dtype."""
        weight = self.weight
        for adapter in self.adapters:
            weight = adapter.added_to(weight)
        return weight

    def gradient(self, dtype: torch.dtype, device: torch.device) -> LowRankGradient:
        """Returns what sums the factors' gradients in this dtype."""
        return LowRankGradient(self.adapters, dtype)


class LowRankGradient:
    """Sums the gradients of adapters' factors, as the tiles of the whole weight's gradient come."""

    def __init__(self, adapters: Sequence[LowRankFactors], dtype: torch.dtype) -> None:
        self._adapters = [
            LowRankFactors(adapter.down.detach().to(dtype), adapter.up.detach(), adapter.scale) for adapter in adapters
        ]
        self._sums = [(torch.zeros_like(each.down), torch.zeros_like(each.up, dtype=dtype)) for each in self._adapters]
        self._dtypes = [adapter.up.dtype for adapter in adapters]

    @property
    def most_rows(self) -> int:
        """Returns the rows of a piece, at least one."""
        width = self._adapters[0].down.shape[1]
        return max(1, piece_numbers(width) // width)

    def add(self, rows: slice, tile: torch.Tensor) -> None:
        """Takes the gradient (C, H) of these rows of the whole weight."""
        for adapter, (down, up) in zip(self._adapters, self._sums, strict=True):
            mm_into(up[rows], tile, adapter.down.t()).mul_(adapter.scale)
            add_mm(down, (adapter.up[rows].to(tile.dtype) * adapter.scale).t(), tile)

    def results(self) -> tuple[torch.Tensor, ...]:
        """Returns the gradients of down (r, H) and up (V, r) of one adapter after the other."""
        pairs = zip(self._sums, self._dtypes, strict=True)
        return tuple(total.to(dtype) for sums, dtype in pairs for total in sums)
