"""Makes padded rows, as TRL's collators do, of token sequences and completions; and token batches of such rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .packing import TokenBatch

# The entries of a batch that show sequences, and their completions.
SEQUENCE_ENTRIES = ("input_ids", "attention_mask")
COMPLETION_ENTRIES = (*SEQUENCE_ENTRIES, "completion_mask")


def pad(rows: Sequence[torch.Tensor], value: int, multiple: int | None = None) -> torch.Tensor:
    """Pads rows (T_i,) on the right with `value` into one tensor (B, T), T rounded up to a `multiple`."""
    width = max(map(len, rows))
    width = width if multiple is None else -(-width // multiple) * multiple
    padded = torch.full((len(rows), width), value, dtype=rows[0].dtype, device=rows[0].device)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def padded_sequences(
    sequences: Sequence[torch.Tensor], pad_token_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Returns `input_ids` and `attention_mask`, (S, T) int64, of S sequences (T_i,)."""
    masks = [torch.ones_like(sequence) for sequence in sequences]
    return {"input_ids": pad(sequences, pad_token_id, multiple), "attention_mask": pad(masks, 0, multiple)}


def padded_completions(
    sequences: Sequence[torch.Tensor], lengths: Sequence[int], pad_token_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Returns `padded_sequences` and `completion_mask` (S, T) int64, 1 on the last `lengths` tokens of each."""
    marks = []
    for sequence, length in zip(sequences, lengths, strict=True):
        mark = torch.zeros_like(sequence)
        mark[len(sequence) - length :] = 1
        marks.append(mark)
    return {**padded_sequences(sequences, pad_token_id, multiple), "completion_mask": pad(marks, 0, multiple)}


def completion_batch(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    branches: int,
    scores_prompts: bool = False,
    images: dict[str, torch.Tensor] | None = None,
) -> TokenBatch:
    """Returns the padded batch of sequences whose marked tokens are scored.

    A marked token is scored if one of its row stands before it, as in TRL's shift by one. With `scores_prompts` so are
    all tokens of prompts' first completions.

    input_ids, attention_mask, completion_mask: (S, T) int64: rows of all prompts' first completions, then of all their
    second ones, and so on. branches: how many completions a prompt has. images: those of the rows, by keyword of the
    model's forward.
    """
    rows, width = input_ids.shape
    places = torch.arange(width, device=input_ids.device).expand_as(input_ids).contiguous()
    marked = completion_mask.bool()
    learned = marked
    if scores_prompts:
        learned = marked.clone()
        learned[: rows // branches] |= attention_mask[: rows // branches].bool()
    # The row of each sequence; sequences are numbered prompt by prompt.
    row_of = torch.arange(rows, device=input_ids.device).view(branches, -1).t().flatten()
    branch, column = (learned & (places > 0))[row_of].nonzero().unbind(1)
    scored = row_of[branch] * width + column
    sizes = torch.bincount(branch, minlength=rows).view(-1, branches).sum(1)
    return TokenBatch(
        input_ids=input_ids,
        position_ids=places,
        attention_mask=attention_mask,
        sequence_lengths=None,
        score_positions=scored - 1,
        targets=input_ids.flatten()[scored],
        branch=branch,
        offset=torch.where(marked, marked.long().cumsum(1) - 1, -1).flatten()[scored],
        branch_lengths=marked.sum(1)[row_of],
        num_tokens=int(attention_mask.sum()),
        group_sizes=tuple(sizes.tolist()),
        images=images,
    )
