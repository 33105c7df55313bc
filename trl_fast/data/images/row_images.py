"""Reads the images of prepared rows for a batch, and shows those of a batch as TRL's collators do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..padded_rows import SEQUENCE_ENTRIES
from .inputs import ImageInput
from .joining import join_images
from .layout import ImageLayout
from .reader import ImageReader

if TYPE_CHECKING:
    from trl_fast.data.packing import TokenBatch


@dataclass(frozen=True)
class RowImages:
    """Knows how a model reads the images of rows (`reader`), and how it wants to have them in a batch (`layout`)."""

    reader: ImageReader
    layout: ImageLayout

    def inputs(self, row: Mapping[str, Any]) -> tuple[ImageInput, ...]:
        """Returns what the model reads of a prepared row's images: pixels are made here."""
        return self.reader.row_inputs(row)

    def entries(self, batch: TokenBatch, order: Sequence[int], input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what TRL's collators tell of the images of padded rows, by keyword of the model's forward.

        order: the sequence of the batch in each of the rows, whose token ids are input_ids (B, T).
        """
        if batch.images is None:
            return {}
        places = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device).view_as(batch.input_ids)
        ids = batch.sequences()
        found = self.layout.by_sequence(ids, batch.by_sequence(places), batch.images, batch.image_shapes)
        ends = [len(each) - length for each, length in zip(ids, batch.branch_lengths.tolist(), strict=True)]
        marked = self.layout.marked_tokens(input_ids, [ends[number] if found[number] else 0 for number in order])
        return join_images([image for number in order for image in found[number]]) | self.layout.types_of(marked)

    def given(self, entries: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns those entries of a batch that tell of images, by keyword of the model's forward."""
        own = set(self.reader.processor.model_input_names) - set(SEQUENCE_ENTRIES)
        return {name: entries[name] for name in entries if name in own}
