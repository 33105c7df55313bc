"""Rows of the head whose gradient is to be taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..matmul import mm_into
from ..slices import spans
from .kept_logits import KeptLogits


@dataclass
class RowBlock:
    """Rows whose gradient is to be taken, with the coefficients of row_kernels.py.

    rows: where they lie in the N rows; hidden: (R, H); targets, lse: (R,); coefficients: (4, R). logits: if they are
    still there, else they are computed again; index: (R,) their rows in `logits`, None for all in order; consume:
    whether logits may be overwritten.
    """

    rows: slice
    hidden: torch.Tensor
    targets: torch.Tensor
    lse: torch.Tensor
    coefficients: torch.Tensor
    logits: KeptLogits | None = None
    index: torch.Tensor | None = None
    consume: bool = False

    @property
    def packed(self) -> bool:
        return self.logits is not None and self.logits.packed

    @property
    def overwritable(self) -> bool:
        """Whether logits lie in order where a gradient of their width may take their place."""
        return self.consume and self.logits is not None and self.index is None

    def parts(self, height: int) -> Iterator[RowBlock]:
        """The same in blocks of at most `height` rows."""
        for part in spans(len(self.targets), height):
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            logits, index = self.logits, None
            if self.index is not None:
                index = self.index[part]
            elif logits is not None:
                logits = logits.part(part)
            coefficients = self.coefficients[:, part].contiguous()
            yield RowBlock(
                rows, self.hidden[part], self.targets[part], self.lse[part], coefficients, logits, index, self.consume
            )

    def raw_logits(self, columns: slice, weight: torch.Tensor | None, scratch: torch.Tensor) -> torch.Tensor:
        """Logits (R, C) of some columns, in `scratch` (R, C) unless they are there, as they are and in order."""
        if self.logits is None:
            return mm_into(scratch, self.hidden, weight.t())
        return self.logits.raw_tile(columns, self.index, scratch)


def row_blocks(
    rows: slice,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    logits: KeptLogits,
    index: torch.Tensor | None,
    *,
    consume: bool = False,
) -> list[RowBlock]:
    """The rows whose logits are kept, and the others.

    rows: where all of them lie; hidden: (R, H); targets, lse: (R,); coefficients: (R, 4); logits: of the first K
    rows; index: (R,) their numbers among the rows that were scored, rising, None if they are all of them.
    """
    num_rows = len(targets)
    kept = min(num_rows, logits.num_rows) if index is None else int((index < logits.num_rows).sum())
    blocks = []
    for part, source in ((slice(0, kept), logits), (slice(kept, num_rows), None)):
        if part.stop > part.start:
            chosen = index[part] if index is not None and source is not None else None
            given = (hidden[part], targets[part], lse[part], coefficients[part].t())
            place = slice(rows.start + part.start, rows.start + part.stop)
            blocks.append(RowBlock(place, *given, logits=source, index=chosen, consume=consume))
    return blocks


def active_rows(coefficients: torch.Tensor, look: bool | None = None) -> torch.Tensor | None:
    """Numbers (A,) of the rows whose coefficients (4, R) are not all zero; None if that is every row.

    look: whether to find out; if not, every row counts. None: on a CPU, since the host of a GPU would have to wait.
    """
    if not (coefficients.device.type == "cpu" if look is None else look):
        return None
    active = coefficients.ne(0).any(dim=0)
    return None if bool(active.all()) else active.nonzero().squeeze(1)
