"""Sums the gradient of a head's weight over processes, a vocabulary tile at a time, each where its numbers are held.

No process then holds the gradient of more than a tile beside that of its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .plan import slices
from .transient_weight import piece_numbers


@dataclass(frozen=True, eq=False)
class WeightShard:
    """Holds the part of a head's weight (V, H) that this process trains, and says who holds the others.

    whole: returns the weight as it is in a pass, (V, H). held: what gets the gradient, differentiable, of any shape
    and float dtype: the numbers of the part in their order, and behind them others that get zero. The processes of
    `group` hold `numbers_each` consecutive numbers of the flattened weight each, in their order, the last ones fewer
    or none. `replicas`: the processes that hold the same part, where there are such.
    """

    whole: Callable[[], torch.Tensor]
    held: torch.Tensor
    shape: torch.Size
    numbers_each: int
    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None = None

    @property
    def parameters(self) -> tuple[torch.Tensor, ...]:
        """Returns what is held, of its own shape."""
        return (self.held,)

    @property
    def num_processes(self) -> int:
        """Returns the processes whose gradients are summed."""
        return self.group.size() * (1 if self.replicas is None else self.replicas.size())

    @property
    def piece_numbers(self) -> int:
        """Returns how many numbers of the gradient are sent at once, at most: whole rows, where they fit."""
        return piece_numbers(self.shape[1], self.numbers_each)

    def pieces(self) -> list[tuple[int, slice]]:
        """Returns which numbers of the flattened weight are sent together, in order, and the rank they go to.

        All processes get the same, whatever they have scored.
        """
        held = slices(0, self.shape.numel(), self.numbers_each)
        return [
            (rank, piece)
            for rank, numbers in enumerate(held)
            for piece in slices(numbers.start, numbers.stop, self.piece_numbers)
        ]

    def gradient(self, dtype: torch.dtype, device: torch.device) -> ShardedGradient:
        """Returns what sends the weight's gradient to those that hold it, summed in this dtype."""
        return ShardedGradient(self, dtype, device)


class ShardedGradient:
    """Takes the gradient of a weight (V, H) in tiles of rows, and keeps the mean over processes of this one's part."""

    def __init__(self, shard: WeightShard, dtype: torch.dtype, device: torch.device) -> None:
        self._shard = shard
        self._pieces = shard.pieces()
        self._sent = 0
        self._piece = torch.empty(0, dtype=dtype, device=device)
        self._sum = torch.zeros(shard.held.numel(), dtype=dtype, device=device)

    @property
    def most_rows(self) -> int:
        """Returns the rows of a piece, at least one."""
        return max(1, self._shard.piece_numbers // self._shard.shape[1])

    def add(self, rows: slice, tile: torch.Tensor) -> None:
        """Takes the gradient (C, H) of the next rows of the weight, and sends what is complete; the tile is changed.

        Every process has to give all rows. Their tiles need not be the same.
        """
        width = self._shard.shape[1]
        start, stop, numbers = rows.start * width, rows.stop * width, tile.view(-1)
        while self._sent < len(self._pieces):
            owner, piece = self._pieces[self._sent]
            part = slice(max(piece.start, start), min(piece.stop, stop))
            if part.start >= part.stop:
                return
            given = numbers[part.start - start : part.stop - start]
            if part != piece:
                given = self._collected(piece, part, given)
            if part.stop < piece.stop:
                return
            self._send(owner, piece, given)
            self._sent += 1

    def _collected(self, piece: slice, part: slice, given: torch.Tensor) -> torch.Tensor:
        """Returns the piece, in which the gradient of a part of its numbers has been put."""
        size = piece.stop - piece.start
        if len(self._piece) < size:
            self._piece = given.new_empty(size)
        self._piece[part.start - piece.start : part.stop - piece.start].copy_(given)
        return self._piece[:size]

    def _send(self, owner: int, piece: slice, gradient: torch.Tensor) -> None:
        dist.reduce(gradient, group_dst=owner, group=self._shard.group)
        if owner == self._shard.group.rank():
            first = owner * self._shard.numbers_each
            self._sum[piece.start - first : piece.stop - first].copy_(gradient)

    def results(self) -> tuple[torch.Tensor, ...]:
        """Returns the mean over processes of the gradient of what is held, in its shape and dtype."""
        assert self._sent == len(self._pieces), "the gradient of every row has been given"
        held = self._shard.held
        if self._shard.replicas is not None:
            dist.all_reduce(self._sum, group=self._shard.replicas)
        return (self._sum.div_(self._shard.num_processes).to(held.dtype).view(held.shape),)
