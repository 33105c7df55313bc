"""Holds logits that wait until their gradient is computed: raw, or packed into 16 bits.

They lie in tiles of columns. On a CPU the rows of one tile lie together: in a (K, V) matrix each row would be in a
memory page of its own. On a GPU there is a single tile of all columns, so that gradients which take the place of the
packed logits are one factor of one product.

Packed logits u are transformed (bias, scale, temperature), so that a step means the same for every head. They are
whole steps of 2⁻¹⁰ below the largest of their chunk of columns, counted from the first column of their tile. A chunk
has 2048 columns, or those of a tile of the fused kernel:

    tops (R, chunks) float32: the largest logit of each chunk; NaN is none
    words (R, C) int16, read as unsigned: k < 65535 is the logit top - k · 2⁻¹⁰, 65535 is -∞; what lies more than
    65534 steps below is brought up there

Probabilities are thus off by at most 0.05%: less than the rounding of a bfloat16 gradient (0.2%), let alone that of a
bfloat16 logit. The row's target is left out, as -∞: its gradient is known without its logit, exactly, and where the
model is sure of it, the other logits of its chunk are steps below the largest of themselves. What is brought up has
e⁻⁶⁴ of the probability of another class. NaN becomes 65535: its row's log-sum-exp is NaN, and so is its gradient. So
is +∞, for the same reason. Tops lie apart from the words so that 16-bit gradients can take the words' place, as the
rows of a matrix. Row kernels pack while they score and unpack while they compute the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from trl_fast.kernels.shared_constants import (
    PACKED_CHUNK,
    PACKED_LOWEST_CODE,
    PACKED_MINUS_INF_CODE,
    PACKED_STEPS_A_NAT,
)

PACKED_DTYPE = torch.int16
# Columns of a chunk, unless a tile of the fused kernel has others.
CHUNK = PACKED_CHUNK
# Rows of words begin at multiples of so many: kernels read and write 16 bytes at once.
ROW_ALIGNMENT = 64


def num_chunks(columns: int, chunk: int = CHUNK) -> int:
    """Returns how many chunks a row of so many logits has."""
    return -(-columns // chunk)


def pack(u: torch.Tensor, words: torch.Tensor, tops: torch.Tensor) -> None:
    """Packs logits u (R, C) float32 into words (R, >= C) int16 and tops (R, >= num_chunks(C)) float32."""
    for number, start in enumerate(range(0, u.shape[1], CHUNK)):
        part = u[:, start : start + CHUNK]
        top = part.masked_fill(part.isnan(), float("-inf")).amax(dim=1)
        steps = (top[:, None] - part) * PACKED_STEPS_A_NAT
        finite = steps.clamp(max=PACKED_LOWEST_CODE).round()
        codes = torch.where(steps < float("inf"), finite, float(PACKED_MINUS_INF_CODE))
        tops[:, number] = top
        words[:, start : start + part.shape[1]] = codes.to(torch.int32).to(PACKED_DTYPE)


def unpack(words: torch.Tensor, tops: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Returns the logits (R, C) float32 of words (R, C) int16 and tops (R, >= num_chunks(C, chunk)) float32."""
    codes = words.to(torch.int32) & 0xFFFF
    top = tops.repeat_interleave(chunk, dim=1)[:, : words.shape[1]]
    return torch.where(codes == PACKED_MINUS_INF_CODE, float("-inf"), top - codes / PACKED_STEPS_A_NAT)


class KeptTile(NamedTuple):
    """Holds some columns of kept logits: values (K, C) float, or words (K, C) int16 with tops (K, chunks) float32."""

    values: torch.Tensor
    tops: torch.Tensor | None = None


@dataclass(frozen=True)
class KeptLogits:
    """Holds the logits of K rows in T tiles of W columns; the last tile is not full.

    values: (T, K, at least W) float, or int16 words; tops: (T, K, chunks of W) float32 of packed ones, else None;
    columns: W; chunk: columns of a chunk.
    """

    values: torch.Tensor
    tops: torch.Tensor | None
    columns: int
    chunk: int = CHUNK

    @property
    def packed(self) -> bool:
        """Tells whether the logits are packed."""
        return self.tops is not None

    @property
    def num_rows(self) -> int:
        """Returns the number of rows K."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Returns the bytes that all rows take."""
        return self.values.nbytes + (0 if self.tops is None else self.tops.nbytes)

    def part(self, rows: slice) -> KeptLogits:
        """Returns the same of some rows."""
        tops = None if self.tops is None else self.tops[:, rows]
        return KeptLogits(self.values[:, rows], tops, self.columns, self.chunk)

    def move(self, rows: slice) -> None:
        """Moves some rows to the front."""
        stop, distance = min(rows.stop, self.num_rows), rows.start
        for values in (self.values, self.tops):
            if values is None or distance == 0:
                continue
            # In parts that do not reach what they take the place of.
            for start in range(distance, stop, distance):
                end = min(start + distance, stop)
                values[:, start - distance : end - distance].copy_(values[:, start:end])

    def tile(self, columns: slice, rows: slice = slice(None)) -> KeptTile:
        """Returns some columns, all of one tile, of some rows; columns of packed logits begin at a chunk."""
        number, start = divmod(columns.start, self.columns)
        stop = start + columns.stop - columns.start
        tops = None
        if self.tops is not None:
            tops = self.tops[number, rows, start // self.chunk : -(-stop // self.chunk)]
        return KeptTile(self.values[number, rows, start:stop], tops)
