"""Measures the token trees of prepared datasets, from which their cost is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from . import packing
from .balanced_batches import TreeSizes, tree_sizes
from .segments import segments_of
from .token_checks import token_tables
from .token_trees import neighbours_share, shared_prefixes


def measured_trees(
    dataset: Dataset, columns: tuple[str, ...], max_length: int | None, *, shares_prompts: bool
) -> TreeSizes:
    """Returns the sizes of the trees of a dataset's R rows.

    Args:
        dataset: prepared rows.
        columns: those of a row's branches, lists of token ids, and maybe `prompt_ids`, the prompt's. Without it, two
            branches are compared, and what they begin with alike is their prompt. In rows of several sequences a
            branch is one of those that `seq_lengths` has the lengths of.
        max_length: the tokens to which a prompt with a branch is cut; None: no limit.
        shares_prompts: whether a prompt is computed once.
    """
    if "seq_lengths" in dataset.column_names:
        return _rows_that_share(dataset) if shares_prompts else _packed_rows(dataset)
    branches = tuple(name for name in columns if name != "prompt_ids")
    compares = "prompt_ids" not in columns and len(branches) == 2 and shares_prompts
    prompts, lengths = [np.empty(0, np.int64)], [np.empty((0, len(branches)), np.int64)]
    for _, table in token_tables(dataset, columns):
        lists = {name: table[name].combine_chunks() for name in columns}
        counts = {name: _lengths(values) for name, values in lists.items()}
        prompt = counts.get("prompt_ids", np.zeros(len(table), np.int64))
        branch = np.stack([counts[name] for name in branches], axis=1)
        if compares:
            prompt = _common_prefixes(*(lists[name] for name in branches))
            branch = branch - prompt[:, None]
        prompts.append(prompt)
        lengths.append(branch)
    prompt, branch = np.concatenate(prompts), np.concatenate(lengths)
    if max_length is not None:
        prompt = prompt.clip(max=max_length)
        branch = np.minimum(branch, max_length - prompt[:, None])
    return tree_sizes(prompt, branch, shares_prompts=shares_prompts)


def tokens_and_pairs(sequences: Sequence[Sequence[int] | np.ndarray], *, shares_prompts: bool) -> tuple[int, float]:
    """Returns the tokens that a model runs on for S sequences in a row, and the pairs of a query and a key.

    shares_prompts: whether what neighbours begin alike with is computed once.
    """
    lengths = [len(ids) for ids in sequences]
    shared = neighbours_share(sequences) if shares_prompts else [0] * len(lengths)
    segments = segments_of(shared_prefixes(lengths, shared, packing.MIN_SHARED_TOKENS))
    pairs = sum(segment.length * (segment.length / 2 + segment.offset) for segment in segments)
    return sum(segment.length for segment in segments), pairs


def _rows_that_share(dataset: Dataset) -> TreeSizes:
    """Returns the sizes of rows that hold several sequences, which are computed once where neighbours begin alike."""
    tokens: list[int] = []
    pairs: list[float] = []
    for _, table in token_tables(dataset, ("input_ids", "seq_lengths")):
        rows = (_arrays(table[name].combine_chunks()) for name in ("input_ids", "seq_lengths"))
        for ids, lengths in zip(*rows, strict=True):
            found = tokens_and_pairs(np.split(ids, lengths.cumsum()[:-1]), shares_prompts=True)
            tokens.append(found[0])
            pairs.append(found[1])
    total = np.array(tokens, dtype=np.float64)
    return TreeSizes(total, np.array(pairs, dtype=np.float64), total)


def _packed_rows(dataset: Dataset) -> TreeSizes:
    """Returns the sizes of rows that hold several sequences, which do not see each other."""
    tokens: list[np.ndarray] = [np.empty(0)]
    pairs: list[np.ndarray] = [np.empty(0)]
    for _, table in token_tables(dataset, ("seq_lengths",)):
        lists = table["seq_lengths"].combine_chunks()
        values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
        rows = np.arange(len(table)).repeat(_lengths(lists))
        tokens.append(np.bincount(rows, values, len(table)))
        pairs.append(np.bincount(rows, values**2 / 2, len(table)))
    total = np.concatenate(tokens)
    return TreeSizes(total, np.concatenate(pairs), total)


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """Returns the lengths of lists (R,) int64; 0 of one that is missing."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _common_prefixes(first: pa.ListArray, second: pa.ListArray) -> np.ndarray:
    """Counts the leading tokens that the lists of two columns share, (R,) int64."""
    found = []
    for left, right in zip(_arrays(first), _arrays(second), strict=True):
        shorter = min(len(left), len(right))
        differ = np.flatnonzero(left[:shorter] != right[:shorter])
        found.append(differ[0] if len(differ) else shorter)
    return np.array(found, dtype=np.int64)


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    """Returns the values of each list of a column."""
    return np.split(lists.flatten().to_numpy(zero_copy_only=False), _lengths(lists).cumsum()[:-1])
