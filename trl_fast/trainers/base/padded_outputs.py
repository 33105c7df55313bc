"""Gives what users' hooks of preference trainers see: sequences to try a model out, and outputs of padded rows."""

from __future__ import annotations

from typing import Any

import torch

from trl_fast.data import AnyDataset
from trl_fast.data.padded_rows import SEQUENCE_ENTRIES

from .batch_reader import AnyBatch, BatchReader


def first_sequences(dataset: AnyDataset, token_columns: tuple[str, ...]) -> list[list[int]]:
    """Returns the token sequences of a prepared dataset's first row: its prompt with each completion."""
    row = next(iter(dataset))
    return [row["prompt_ids"] + row[column] for column in token_columns if column != "prompt_ids"]


def with_padded_outputs(
    batches: BatchReader, loss: torch.Tensor, model: torch.nn.Module, inputs: AnyBatch
) -> tuple[torch.Tensor, Any]:
    """Returns a loss, a scalar, and the model's own output of the batch's padded rows, without gradient."""
    entries = batches.entries(inputs)
    rows = {name: entries[name] for name in SEQUENCE_ENTRIES}
    with torch.no_grad():
        return loss, model(**rows, use_cache=False)
