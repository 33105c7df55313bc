"""Counts the tokens that batches hold, that the model computes, and that rows with padding would have."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trl_fast.data import TokenBatch
from trl_fast.data.segments import sequence_lengths


class TokenCounter:
    """Counts the tokens that this process has trained on; nothing here waits for a device.

    - `seen`: tokens of all sequences, a prompt once for each of its completions, as the metric num_tokens has it; goes
      on in a run that is resumed.
    - `computed`: positions that the model has run on: with shared prompts fewer than seen, with padding more.
    - `padded`: positions of the same micro-batches with a row a sequence, padded to the longest, as TRL has them.
    """

    def __init__(self) -> None:
        self.seen = self.computed = self.padded = 0

    def add(self, batch: TokenBatch) -> None:
        """Counts a micro-batch."""
        self.seen += batch.num_tokens
        self.computed += batch.input_ids.numel()
        self.padded += padded_positions(batch)

    def metric(self, batch: TokenBatch, *, trains: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens seen so far as a metric of the batch's micro-batch, which counts if it `trains`.

        Every micro-batch enters with the running total, and the last one is what is logged, as in TRL.
        """
        if trains:
            self.add(batch)
        device = batch.input_ids.device
        return torch.full((), float(self.seen), device=device), torch.ones((), device=device)

    @property
    def saved(self) -> float | None:
        """Returns the share of the padded positions that was not computed; None if there were none."""
        return 1 - self.computed / self.padded if self.padded else None


def padded_positions(batch: TokenBatch) -> int:
    """Returns the positions of a batch's sequences in rows of their own, padded to the longest."""
    if batch.tree_lengths is None:
        return batch.input_ids.numel()
    return max(sequence_lengths(batch.tree_lengths), default=0) * len(batch)


def count_tokens(batches: Iterable[TokenBatch]) -> TokenCounter:
    """Returns the counts of some batches."""
    counter = TokenCounter()
    for batch in batches:
        counter.add(batch)
    return counter
