"""Raw logits that wait until their gradient is taken, tile by tile, as they are or in 16 bits.

One tile's rows lie together: in a (K, V) matrix each row would be in a memory page of its own.

Packed logits are whole steps below the largest of their chunk of 2048 columns:

    chunk: the largest logit z₀ (float32, two 16-bit words), then a word a column
    word k < 65535 is the logit z₀ - k · step; 65535 is -∞; what lies more than 65534 steps below is brought up there

A step stands for 2⁻¹⁰ in the log-probability, so probabilities are off by at most 0.05%: less than the rounding of a
bfloat16 gradient (0.2%), let alone that of a bfloat16 logit. The largest logit is exact, and with it the p - 1 of a
target that the model is sure of. What is brought up has a probability below e⁻⁶⁴.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

PACKED_DTYPE = torch.int16
_CHUNK, _HEADER = 2048, 2
_LOGPROB_STEP = 2.0**-10


def packed_columns(columns: int) -> int:
    """16-bit words that a row of so many logits takes."""
    return columns + _HEADER * -(-columns // _CHUNK)


def packing_step(slope: float) -> float:
    """The step of raw logits, given du/dz of the linear LogitTransform that makes log-probabilities of them."""
    return _LOGPROB_STEP / abs(slope)


@dataclass(frozen=True)
class KeptLogits:
    """Raw logits of K rows in T tiles of W columns; the last tile is not full.

    values: (T, K, W) float, or (T, K, packed_columns(W)) int16, whose step `step` is.
    """

    values: torch.Tensor
    step: float

    @property
    def packed(self) -> bool:
        return self.values.dtype == PACKED_DTYPE

    @property
    def num_rows(self) -> int:
        return self.values.shape[1]

    @property
    def columns(self) -> int:
        """W."""
        width = self.values.shape[2]
        return width - _HEADER * -(-width // (_CHUNK + _HEADER)) if self.packed else width

    def part(self, rows: slice) -> KeptLogits:
        """The same of some rows."""
        return replace(self, values=self.values[:, rows])

    def room(self, number: int, rows: slice, scratch: torch.Tensor) -> torch.Tensor:
        """Where the rows' logits (R, C) of tile `number` are to be written: here, or to `scratch` (R, C)."""
        return scratch if self.packed else self.values[number, rows, : scratch.shape[1]]

    def put(self, number: int, rows: slice, tile: torch.Tensor) -> None:
        """Keeps logits (R, C) that were written where `room` says."""
        if self.packed:
            torch.ops.trl_fast.pack_rows(tile, self.step, self.values[number, rows])

    def tile(self, number: int, index: torch.Tensor | None, scratch: torch.Tensor) -> torch.Tensor:
        """Logits (R, C) of the rows `index` (R,), None for all in order: in `scratch` (R, C) unless they lie here."""
        if self.packed:
            torch.ops.trl_fast.unpack_rows(self.values[number], index, self.step, scratch)
            return scratch
        tile = self.values[number, :, : scratch.shape[1]]
        return tile if index is None else torch.index_select(tile, 0, index, out=scratch)
