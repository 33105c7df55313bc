"""Logits that wait until their gradient is taken, tile by tile: raw ones as they are, or transformed ones in 16 bits.

One tile's rows lie together: in a (K, V) matrix each row would be in a memory page of its own.

Packed logits u are transformed (bias, scale, temperature), so that a step means the same for every head. They are
whole steps of 2⁻¹⁰ below the largest of their chunk of 2048 columns:

    chunk: the largest logit u₀ (float32, two 16-bit words), then a word a column
    word k < 65535 is the logit u₀ - k · 2⁻¹⁰; 65535 is -∞; what lies more than 65534 steps below is brought up there

Probabilities are thus off by at most 0.05%: less than the rounding of a bfloat16 gradient (0.2%), let alone that of a
bfloat16 logit. The largest logit is exact, and with it the p - 1 of a target that the model is sure of. What is
brought up has a probability below e⁻⁶⁴. Row kernels pack while they score and unpack while they take the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PACKED_DTYPE = torch.int16
_CHUNK, _HEADER = 2048, 2


def packed_columns(columns: int) -> int:
    """16-bit words that a row of so many logits takes."""
    return columns + _HEADER * -(-columns // _CHUNK)


@dataclass(frozen=True)
class KeptLogits:
    """Logits of K rows in T tiles of W columns; the last tile is not full.

    values: (T, K, W) float, or (T, K, packed_columns(W)) int16.
    """

    values: torch.Tensor

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
        return KeptLogits(self.values[:, rows])

    def raw_tile(self, number: int, index: torch.Tensor | None, scratch: torch.Tensor) -> torch.Tensor:
        """Raw logits (R, C): of all rows where they lie, or of the rows `index` (R,) in `scratch` (R, C)."""
        tile = self.values[number, :, : scratch.shape[1]]
        return tile if index is None else torch.index_select(tile, 0, index, out=scratch)
