"""Reads the batches of a trainer, whoever made or changed them: as what the model runs on, or as TRL's entries."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trl_fast.data import DictBatch, DictCollator, TokenBatch
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

logger = logging.getLogger(__name__)

AnyBatch = DictBatch | TokenBatch | Mapping[str, Any]


class BatchReader:
    """Reads batches of the shape that a method's own collator makes, and dicts with the entries of TRL's."""

    def __init__(self, collator: DictCollator) -> None:
        self.collator = collator
        self._said = False

    def unread(self, inputs: AnyBatch) -> TokenBatch | None:
        """Returns the token batch of a collator of ours, if nobody has looked into it."""
        if isinstance(inputs, DictBatch):
            return None if inputs.is_read else inputs.token_batch()
        return inputs if isinstance(inputs, TokenBatch) else None

    def token_batch(self, inputs: AnyBatch) -> TokenBatch:
        """Returns what the model runs on.

        A batch into which somebody has looked, and every dict, is run as its padded rows; it is said once.

        Raises:
            ValueError: an entry is missing, or there is one that the loss does not read; names them.
        """
        batch = self.unread(inputs)
        if batch is not None:
            return batch
        self.say_if_read(inputs)
        return self.collator.token_batch(self.entries(inputs))

    def entries(self, inputs: AnyBatch) -> dict[str, Any]:
        """Returns the entries that TRL's collator would have made, for reading only."""
        if isinstance(inputs, TokenBatch):
            return self.collator.entries(inputs)
        return inputs.copy() if isinstance(inputs, DictBatch) else dict(inputs)

    def say_if_read(self, inputs: AnyBatch) -> None:
        """Says, once, that rows are padded where the entries of batches are what counts."""
        if self._said or self.unread(inputs) is not None or self.collator.lays_out_entries:
            return
        self._said = True
        if not BATCH_LAYOUTS[self.collator.layout].pads:
            logger.warning(
                "batch_layout: the rows of batches are padded, as TRL pads them, because data_collator or a method of "
                "a subclass makes, reads or changes their entries. That is slower and takes more memory."
            )
