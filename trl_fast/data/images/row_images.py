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

    def first_of(self, images: Sequence[ImageInput], ids: Sequence[int]) -> tuple[ImageInput, ...]:
        """Returns the first images, as many as the image tokens among these ids stand for."""
        waiting, taken = sum(token == self.layout.image_token_id for token in ids), 0
        while waiting > 0 and taken < len(images):
            waiting -= images[taken].num_tokens
            taken += 1
        return tuple(images[:taken])

    def of_sequences(self, batch: TokenBatch) -> list[tuple[ImageInput, ...]]:
        """Returns the images of each of a batch's sequences, in the order of their tokens."""
        if batch.images is None:
            return [()] * len(batch)
        places = torch.arange(batch.input_ids.numel(), device=batch.input_ids.device).view_as(batch.input_ids)
        return self.layout.by_sequence(batch.sequences(), batch.by_sequence(places), batch.images, batch.image_shapes)

    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        """Returns the keys of `entries`."""
        return self.layout.type_names if batch.images is None else tuple(batch.images)

    def entries(
        self, batch: TokenBatch, order: Sequence[int], input_ids: torch.Tensor, prompts: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """Returns what TRL's collators tell of the images of padded rows, by keyword of the model's forward.

        order: the sequence of the batch in each of the rows, whose token ids are input_ids (B, T). prompts: how many
        tokens the prompt of each sequence has; None: those before its completion.
        """
        found = self.of_sequences(batch)
        if prompts is None:
            whole = [len(each) for each in batch.sequences()]
            prompts = [length - of for length, of in zip(whole, batch.branch_lengths.tolist(), strict=True)]
        marked = self.layout.marked_tokens(input_ids, [prompts[number] if found[number] else 0 for number in order])
        joined = [image for number in order for image in found[number]]
        return (join_images(joined) if joined else {}) | self.layout.types_of(marked)

    def given(self, entries: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns those entries of a batch that tell of images, by keyword of the model's forward."""
        own = set(self.reader.processor.model_input_names) - set(SEQUENCE_ENTRIES)
        return {name: entries[name] for name in entries if name in own}
