"""Sums the gradient of a head's weight over processes, a vocabulary tile at a time, each tile where its rows are held.

No process then holds the gradient of more than a tile beside that of its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .plan import slices

# Of the float32 gradient that is sent at once.
PIECE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class WeightShard:
    """Holds the rows of a head's weight (V, H) that this process trains, and says who holds the others.

    rows: (S, H) of any float dtype, differentiable. The processes of `group` hold ceil(V / size) rows each, in their
    order, the last ones fewer or none. `replicas`: the processes that hold the same rows, where there are such.
    """

    rows: torch.Tensor
    vocab_size: int
    group: dist.ProcessGroup
    replicas: dist.ProcessGroup | None = None

    @property
    def num_processes(self) -> int:
        """Returns the processes whose gradients are summed."""
        return self.group.size() * (1 if self.replicas is None else self.replicas.size())

    @property
    def piece_rows(self) -> int:
        """Returns how many rows of the gradient are sent at once, at most."""
        return max(1, min(self.rows_each, PIECE_BYTES // (4 * self.rows.shape[1])))

    @property
    def rows_each(self) -> int:
        """Returns how many rows a process holds, at most."""
        return -(-self.vocab_size // self.group.size())

    def pieces(self) -> list[tuple[int, slice]]:
        """Returns which rows are sent together, from the first to the last one, and the rank in `group` they go to.

        All processes get the same, whatever they have scored.
        """
        held = slices(0, self.vocab_size, self.rows_each)
        return [
            (rank, piece) for rank, rows in enumerate(held) for piece in slices(rows.start, rows.stop, self.piece_rows)
        ]


class ShardedGradient:
    """Takes the gradient of a weight (V, H) in tiles of rows, and keeps the mean over processes of this one's rows."""

    def __init__(self, shard: WeightShard, dtype: torch.dtype, device: torch.device) -> None:
        self._shard = shard
        self._pieces = shard.pieces()
        self._sent = 0
        self._piece = torch.empty(0, dtype=dtype, device=device)
        self._sum = torch.zeros(shard.rows.shape, dtype=dtype, device=device)

    @property
    def piece_rows(self) -> int:
        """Returns how many rows are sent at once, at most."""
        return self._shard.piece_rows

    def add(self, rows: slice, tile: torch.Tensor) -> None:
        """Takes the gradient (C, H) of the next rows of the weight, and sends what is complete; the tile is changed.

        Every process has to give all rows. Their tiles need not be the same.
        """
        while self._sent < len(self._pieces):
            owner, piece = self._pieces[self._sent]
            part = slice(max(piece.start, rows.start), min(piece.stop, rows.stop))
            if part.start >= part.stop:
                return
            given = tile[part.start - rows.start : part.stop - rows.start]
            if part != piece:
                given = self._collected(piece, part, given)
            if part.stop < piece.stop:
                return
            self._send(owner, piece, given)
            self._sent += 1

    def _collected(self, piece: slice, part: slice, given: torch.Tensor) -> torch.Tensor:
        """Returns the piece, in which the gradient of a part of its rows has been put."""
        num_rows = piece.stop - piece.start
        if len(self._piece) < num_rows:
            self._piece = given.new_empty(num_rows, given.shape[1])
        self._piece[part.start - piece.start : part.stop - piece.start].copy_(given)
        return self._piece[:num_rows]

    def _send(self, owner: int, piece: slice, gradient: torch.Tensor) -> None:
        dist.reduce(gradient, group_dst=owner, group=self._shard.group)
        if owner == self._shard.group.rank():
            first = owner * self._shard.rows_each
            self._sum[piece.start - first : piece.stop - first].copy_(gradient)

    def result(self) -> torch.Tensor:
        """Returns the mean over processes of the gradient of this process's rows, (S, H) in their dtype."""
        assert self._sent == len(self._pieces), "the gradient of every row has been given"
        if self._shard.replicas is not None:
            dist.all_reduce(self._sum, group=self._shard.replicas)
        return self._sum.div_(self._shard.num_processes).to(self._shard.rows.dtype)
