"""Says what a head's weight is to an op when it is whole only while a pass runs, and not from forward to backward.

An engine that holds weights in parts gathers them for each pass. What such a weight is made of, and who gets its
gradient, differs: see `WholeWeight` and `FrozenWeight` here, weight_shard.py and low_rank_weight.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

# Of the float32 gradient that is there at once.
PIECE_BYTES = 256 << 20


def piece_numbers(width: int, most: int | None = None) -> int:
    """Returns how many numbers of a gradient are there at once: whole rows of `width` if they fit; most: a limit."""
    limit = max(1, PIECE_BYTES // 4 if most is None else min(most, PIECE_BYTES // 4))
    return limit if limit < width else limit // width * width


class TiledGradient(Protocol):
    """Takes the gradient of a weight (V, H) in tiles of rows, from the first row to the last one."""

    @property
    def most_rows(self) -> int:
        """Returns how many rows a tile had better have at most."""

    def add(self, rows: slice, tile: torch.Tensor) -> None:
        """Takes the gradient (C, H) of the next rows; the tile may be changed."""

    def results(self) -> tuple[torch.Tensor, ...]:
        """Returns the gradients of the weight's `parameters`, each of its own shape and dtype."""


class TransientWeight(Protocol):
    """Makes a head's weight (V, H) whole for a pass. All processes that hold it in parts run the same passes."""

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Returns what gets a gradient in place of the weight, of any shapes; empty if nothing trains."""

    def whole(self) -> torch.Tensor:
        """Returns the weight (V, H); called while a forward or a backward pass runs, and not kept."""

    def gradient(self, dtype: torch.dtype, device: torch.device) -> TiledGradient:
        """Returns what takes the weight's gradient, in tiles of this dtype on this device."""


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """Reads a weight (V, H) that does not train anew for each pass."""

    whole: Callable[[], torch.Tensor]
    parameters: tuple[torch.Tensor, ...] = ()

    def gradient(self, dtype: torch.dtype, device: torch.device) -> TiledGradient:
        """Raises: there is no gradient."""
        raise AssertionError("a frozen weight has no gradient")


@dataclass(frozen=True, eq=False)
class WholeWeight:
    """Holds a weight (V, H) that its engine frees after forward, and whose gradient the engine takes whole."""

    weight: torch.Tensor

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Returns the weight (V, H)."""
        return (self.weight,)

    def whole(self) -> torch.Tensor:
        """Returns the weight (V, H)."""
        return self.weight

    def gradient(self, dtype: torch.dtype, device: torch.device) -> TiledGradient:
        """Returns what collects all tiles."""
        return WholeGradient(torch.empty_like(self.weight))


@dataclass(frozen=True, eq=False)
class WholeGradient:
    """Collects the gradient of a weight in its dtype: total (V, H)."""

    total: torch.Tensor

    @property
    def most_rows(self) -> int:
        """Returns the rows of a piece, at least one."""
        return max(1, piece_numbers(self.total.shape[1]) // self.total.shape[1])

    def add(self, rows: slice, tile: torch.Tensor) -> None:
        """Takes the gradient (C, H) of these rows."""
        self.total[rows].copy_(tile)

    def results(self) -> tuple[torch.Tensor, ...]:
        """Returns the gradient (V, H)."""
        return (self.total,)
