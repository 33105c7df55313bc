"""Data for KTO: from single completions, each good or bad, to token trees and a batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from .checks import check_preference_row, check_tokenizer, kind_of, place, remove_rows, shorten, text_columns
from .dataset_types import AnyDataset, map_options
from .formats import (
    cut_parts,
    drop_without_room,
    is_conversational,
    maybe_extract_prompt,
    tokenize_unpaired,
)
from .packing import TokenBatch, pack_trees
from .token_trees import Tree
from .unpaired import maybe_unpair_preference_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

UNPAIRED_COLUMNS = ("prompt_ids", "completion_ids")
# A completion of another row, with which the policy's distance from the reference is estimated.
KL_COLUMN = "KL_completion_ids"
LABEL = "label"
UNPAIRED_REFERENCE_COLUMNS = ("ref_logps", "ref_KL_logps")
# Extras of a batch of completions: the same prompts with the completions of KL_COLUMN, and with both.
MISMATCHED, BOTH = "mismatched", "both"
# Extra of the batch BOTH: which of its scored tokens are those of the batch itself.
OWN_TOKENS = "own_tokens"

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 1


def prepare_unpaired_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    kl_block: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Check a dataset of labelled completions, tokenize it, and give each row a completion of another one.

    Rows have `prompt`, `completion` and `label` (True for good ones), as text or as messages; or they are preference
    pairs, which become two rows each (`unpair_preference_dataset`). The answer has the columns `prompt_ids` and
    `completion_ids` (int64 lists) beside the dataset's own; a dataset that has the two already is not tokenized again.
    The lengths are those of `prepare_preference_dataset`. Streams are tokenized and checked as they are read.

    kl_block: the column `KL_completion_ids` of a row is the completion of the row before it, within blocks of so many
    rows; that of a block's first row is the completion of its last. None: no such column.

    Raises ValueError for bad data, naming the dataset `name` and the row.
    """
    columns = _check_columns(dataset, name)
    check_tokenizer(processing_class)
    if not set(UNPAIRED_COLUMNS) <= set(columns):
        dataset = _tokenize(dataset, columns, processing_class, num_proc, name)
    elif isinstance(dataset, Dataset):
        _check_token_rows(dataset, name)
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    dataset = cut_parts(dataset, UNPAIRED_COLUMNS[1:], **limits, num_proc=num_proc, name=name)
    if max_length is not None and truncation_mode == "keep_start":
        dataset = drop_without_room(dataset, max_length, num_proc, name)
    if kl_block is None:
        return dataset
    # In one process: the parts of several would not end where blocks do.
    options = map_options(dataset, None, f"Pairing {name} prompts with other completions")
    return dataset.map(_add_other_completions, batched=True, batch_size=kl_block, **options)


def warn_of_balance(dataset: Dataset, desirable_weight: float, undesirable_weight: float) -> None:
    """Says so if all labels are the same, or if one kind outweighs the other more than the paper recommends.

    All good completions should weigh 1 to 4/3 times what all bad ones do, arXiv 2402.01306, Eq. 8. As in TRL, bounds
    are rounded to two digits, and datasets with as many good as bad completions are not judged.
    """
    labels = dataset.with_format(None)[LABEL]
    good = sum(map(bool, labels))
    bad = len(labels) - good
    if 0 in (good, bad):
        logger.warning(
            f"The train dataset: all {len(labels)} labels are {bool(good)}, so there is nothing to tell the "
            "completions from. KTO learns from good and bad ones; check how the column 'label' was filled."
        )
        return
    if good == bad:
        return
    lead = good * desirable_weight / bad
    trail = bad * undesirable_weight / good
    for_desirable = round(trail, 2), round(1.33 * trail, 2)
    for_undesirable = round(lead / 1.33, 2), round(lead, 2)
    fits = (
        for_desirable[0] <= desirable_weight <= for_desirable[1]
        or for_undesirable[0] <= undesirable_weight <= for_undesirable[1]
    )
    if not fits:
        logger.warning(
            f"The train dataset has {good} good and {bad} bad completions, which desirable_weight={desirable_weight} "
            f"and undesirable_weight={undesirable_weight} do not balance. The KTO paper recommends "
            f"desirable_weight in {list(for_desirable)} or undesirable_weight in {list(for_undesirable)}, not both."
        )


def _check_columns(dataset: AnyDataset, name: str) -> list[str]:
    columns = text_columns(dataset, "at least one completion with a label", name)
    known = set(columns)
    if {"chosen", "rejected"} <= known or known >= {*UNPAIRED_COLUMNS, LABEL}:
        return columns
    missing = [column for column in ("prompt", "completion", LABEL) if column not in known]
    if missing:
        raise ValueError(
            f"The {name} dataset has the columns {columns}, but no {missing[0]!r}; expected 'prompt', 'completion' "
            "and 'label' (True for good completions, False for bad ones), or the tokenized prompt_ids, "
            "completion_ids and label, or preference pairs of 'chosen' and 'rejected'. Rename yours with "
            "dataset.rename_column(...)."
        )
    return columns


def _tokenize(
    dataset: AnyDataset,
    columns: list[str],
    processing_class: PreTrainedTokenizerBase,
    num_proc: int | None,
    name: str,
) -> AnyDataset:
    if {"chosen", "rejected"} <= set(columns):
        options = map_options(dataset, num_proc, f"Checking {name} dataset")
        dataset = dataset.map(_check_pair, with_indices=True, fn_kwargs={"name": name}, **options)
        dataset = maybe_unpair_preference_dataset(dataset, num_proc, f"Unpairing {name} dataset")
    arguments = {"processing_class": processing_class, "name": name, "format_version": FORMAT_VERSION}
    options = map_options(dataset, num_proc, f"Tokenizing {name} dataset")
    return dataset.map(_tokenize_row, with_indices=True, fn_kwargs=arguments, **options)


def _check_token_rows(dataset: Dataset, name: str) -> None:
    rows = dataset.select_columns([UNPAIRED_COLUMNS[1], LABEL]).with_format(None)
    for row, example in enumerate(rows):
        _check_label(example[LABEL], row, name)
        if not example["completion_ids"]:
            raise ValueError(
                f"{place(name, row)}, column 'completion_ids': the completion has no tokens. "
                f"{remove_rows('completion_ids')}"
            )


def _check_label(label: Any, row: int, name: str) -> None:
    if not (isinstance(label, (bool, int, float)) and label in (0, 1)):
        raise ValueError(
            f"{place(name, row)}, column 'label': {shorten(label)} is no truth value; expected True for a good "
            "completion, False for a bad one."
        )


def _check_row(example: dict[str, Any], row: int, name: str) -> None:
    _check_label(example[LABEL], row, name)
    kinds = {column: kind_of(example[column]) for column in ("prompt", "completion")}
    for column, kind in kinds.items():
        if kind is None:
            raise ValueError(
                f"{place(name, row)}, column {column!r}: {shorten(example[column])} is of type "
                f"{type(example[column]).__name__}; expected a string, or a list of messages such as "
                "{'role': 'assistant', 'content': 'Hello.'}."
            )
    if not example["completion"]:
        raise ValueError(
            f"{place(name, row)}, column 'completion': the completion is empty. {remove_rows('completion')}"
        )
    if example["prompt"] == []:
        raise ValueError(f"{place(name, row)}, column 'prompt': there are no messages. Fill it, or remove the row.")
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{place(name, row)}: 'prompt' is {kinds['prompt']}, 'completion' is {kinds['completion']}; expected both "
            "to be text, or both messages."
        )


# The functions given to `map` stand at module level: datasets pickles them for its worker processes and hashes them
# for its cache.


def _check_pair(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    check_preference_row(example, row, name)
    return maybe_extract_prompt(example)


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    name: str,
    format_version: int,
) -> dict[str, list[int]]:
    _check_row(example, row, name)
    check_tokenizer(processing_class, needs_eos=not is_conversational(example))
    token_ids = tokenize_unpaired(example, processing_class)
    if not token_ids["completion_ids"]:
        raise ValueError(
            f"{place(name, row)}, column 'completion': the completion has no tokens after tokenization. Fill it, or "
            "remove the row."
        )
    return token_ids


def _add_other_completions(examples: dict[str, list]) -> dict[str, list]:
    completions = examples["completion_ids"]
    return {KL_COLUMN: [*completions[-1:], *completions[:-1]]}


@dataclass
class DataCollatorForUnpairedPreference:
    """Collate rows with `prompt_ids`, `completion_ids` and `label` into a `TokenBatch` of a sequence a row.

    The arguments are those of `DataCollatorForPreference`. The labels ride along in `extras` as bool (S,), precomputed
    reference log-probabilities `ref_logps` and `ref_KL_logps` as float32 (S,). Where rows have `KL_completion_ids`,
    so do two more batches: `MISMATCHED`, of the prompts with those, and `BOTH`, where sequence 2i is row i's own and
    2i + 1 the other one, which share their prompt.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    layout: str = "padded"

    def __call__(self, examples: list[dict[str, Any]]) -> TokenBatch:
        batch = self._pack(examples, "completion_ids")
        batch.extras[LABEL] = torch.tensor([bool(row[LABEL]) for row in examples])
        for column in UNPAIRED_REFERENCE_COLUMNS:
            if column in examples[0]:
                batch.extras[column] = torch.tensor([row[column] for row in examples], dtype=torch.float32)
        if KL_COLUMN in examples[0]:
            both = self._pack(examples, "completion_ids", KL_COLUMN)
            both.extras[OWN_TOKENS] = (both.branch % 2 == 0).nonzero().flatten()
            batch.extras.update({MISMATCHED: self._pack(examples, KL_COLUMN), BOTH: both})
        return batch

    def _pack(self, examples: list[dict[str, Any]], *columns: str) -> TokenBatch:
        trees = [Tree(row["prompt_ids"], [row[column] for column in columns]) for row in examples]
        return pack_trees(
            trees, self.layout, self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        )
