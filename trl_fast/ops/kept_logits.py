"""Logits that wait until their gradient is taken, in tiles of columns: raw ones as they are, or packed into 16 bits.

On a CPU one tile's rows lie together: in a (K, V) matrix each row would be in a memory page of its own. On a GPU there
is a single tile of all columns, so that gradients which take the place of the words are one factor of one product.
The format of packed ones is in packed_logits.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .memory_pool import pooled_empty
from .packed_logits import CHUNK, PACKED_DTYPE, num_chunks

# Rows of words begin at multiples of so many: kernels read and write 16 bytes at once.
_ROW_ALIGNMENT = 64


class KeptTile(NamedTuple):
    """Some columns of kept logits: values (K, C) float, or words (K, C) int16 with tops (K, chunks) float32."""

    values: torch.Tensor
    tops: torch.Tensor | None = None

    def part(self, rows: slice) -> KeptTile:
        """The same of some rows."""
        return KeptTile(self.values[rows], None if self.tops is None else self.tops[rows])


@dataclass(frozen=True)
class KeptLogits:
    """Logits of K rows in T tiles of W columns; the last tile is not full.

    values: (T, K, at least W) float, or int16 words; tops: (T, K, chunks of W) float32 of packed ones, else None;
    columns: W; chunk: columns of a chunk.
    """

    values: torch.Tensor
    tops: torch.Tensor | None
    columns: int
    chunk: int = CHUNK

    @classmethod
    def empty(
        cls,
        num_rows: int,
        vocab_size: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int = CHUNK,
    ) -> KeptLogits:
        """Room for the logits of `num_rows` rows in tiles of `columns`; dtype: PACKED_DTYPE, or that of raw logits."""
        num_tiles = -(-vocab_size // columns)
        width = columns if num_tiles > 1 else -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        values = pooled_empty((num_tiles, num_rows, width), dtype, device)
        tops = None
        if dtype == PACKED_DTYPE:
            tops = pooled_empty((num_tiles, num_rows, num_chunks(columns, chunk)), torch.float32, device)
        return cls(values, tops, columns, chunk)

    @property
    def packed(self) -> bool:
        return self.tops is not None

    @property
    def num_rows(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.tops is None else self.tops.nbytes)

    def part(self, rows: slice) -> KeptLogits:
        """The same of some rows."""
        tops = None if self.tops is None else self.tops[:, rows]
        return KeptLogits(self.values[:, rows], tops, self.columns, self.chunk)

    def tile(self, columns: slice) -> KeptTile:
        """Some columns, all of one tile; packed ones begin at a chunk."""
        number, start = divmod(columns.start, self.columns)
        stop = start + columns.stop - columns.start
        tops = None if self.tops is None else self.tops[number, :, start // self.chunk : num_chunks(stop, self.chunk)]
        return KeptTile(self.values[number, :, start:stop], tops)

    def raw_tile(self, columns: slice, index: torch.Tensor | None, scratch: torch.Tensor) -> torch.Tensor:
        """Raw logits (R, C): of all rows where they lie, or of the rows `index` (R,) in `scratch` (R, C)."""
        values = self.tile(columns).values
        return values if index is None else torch.index_select(values, 0, index, out=scratch)
