"""Makes token trees, and batches of them, of single completions, each good or bad: data for KTO."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict

from .added_columns import add_columns
from .attention_masks import strip_padding
from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset, DatasetOrDict, get_dataset_column_names, map_options
from .dict_batch import check_entries
from .formats import is_conversational, maybe_extract_prompt
from .images.length_checks import check_images_are_kept
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.tokenization import tokenize_with_images
from .packing import TokenBatch
from .padded_rows import COMPLETION_ENTRIES, completion_batch
from .preference import TreeCollator, reference_logprobs
from .row_checks import (
    LABEL,
    UNPAIRED_TOKEN_COLUMNS,
    check_label,
    check_preference_row,
    check_unpaired_columns,
    check_unpaired_row,
)
from .row_places import place, remove_rows
from .tensor_collator import TensorCollator
from .tokenization import tokenize_unpaired
from .tokenizer_checks import check_tokenizer
from .truncation import cut_parts, drop_without_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A completion of another row, with which the policy's distance from the reference is estimated.
KL_COLUMN = "KL_completion_ids"
UNPAIRED_REFERENCE_COLUMNS = ("ref_logps", "ref_KL_logps")
# The weight of a row's loss, by its prompt.
PROMPT_WEIGHT = "prompt_weight"
# The entries that show the prompts with the completions of KL_COLUMN, and the numbers that a batch has of each row.
MISMATCHED_PREFIX = "KL_"
MISMATCHED_ENTRIES = tuple(MISMATCHED_PREFIX + name for name in COMPLETION_ENTRIES)
_NUMBERS = (*UNPAIRED_REFERENCE_COLUMNS, PROMPT_WEIGHT, LABEL)
# Extras of a batch of completions: the same prompts with the completions of KL_COLUMN, and with both.
MISMATCHED, BOTH = "mismatched", "both"
# Extra of the batch BOTH: which of its scored tokens are those of the batch itself.
OWN_TOKENS = "own_tokens"

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 2


def prepare_unpaired_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    image_reader: ImageReader | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    kl_batch_size: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Checks a dataset of labelled completions, tokenizes it, and gives each row a completion of another one.

    Rows have `prompt`, `completion` and `label` (True for good ones), as text or as messages; or they are preference
    pairs, which become two rows each (`unpair_preference_dataset`). The answer has the columns `prompt_ids` and
    `completion_ids` (int64 lists) beside the dataset's own; a dataset that has the two already is not tokenized again.
    The lengths and `image_reader` are those of `prepare_preference_dataset`. Streams are tokenized and checked as they
    are read.

    kl_batch_size: the column `KL_completion_ids` of a row is the completion of the row before it, within batches of
    so many rows; that of a batch's first row is the completion of its last. None: no such column.

    Raises ValueError for bad data, naming the dataset `name` and the row.
    """
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    columns = check_unpaired_columns(dataset, name, reads_images=image_reader is not None)
    check_tokenizer(processing_class)
    if not set(UNPAIRED_TOKEN_COLUMNS) <= set(columns):
        dataset = _tokenize(dataset, columns, processing_class, image_reader, num_proc, name)
    else:
        dataset = strip_padding(dataset, UNPAIRED_TOKEN_COLUMNS, num_proc=num_proc, name=name)
        if isinstance(dataset, Dataset):
            _check_token_rows(dataset, name)
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    if image_reader is not None:
        dataset = check_images_are_kept(
            dataset, image_reader.image_token_id, max_length, truncation_mode, max_prompt_length, name
        )
    dataset = cut_parts(dataset, UNPAIRED_TOKEN_COLUMNS[1:], **limits, num_proc=num_proc, name=name)
    if max_length is not None and truncation_mode == "keep_start":
        dataset = drop_without_room(dataset, max_length, num_proc, name)
    if kl_batch_size is None:
        return dataset
    # In one process: the parts of several would not end where batches do.
    batches: dict[str, Any] = {"with_indices": False, "batched": True, "batch_size": kl_batch_size}
    desc = f"Pairing {name} prompts with other completions"
    return add_columns(dataset, _add_other_completions, num_proc=None, desc=desc, **batches)


def unpair_preference_dataset(dataset: DatasetOrDict, **map_kwargs: Any) -> DatasetOrDict:
    """Turns each row with `chosen` and `rejected` into two with `completion` and a bool `label` (chosen: True).

    Other columns, `prompt` among them, are repeated for both. Within each batch that `map` takes, all chosen
    completions come before the rejected ones. `map_kwargs` are those of `Dataset.map`.
    """
    return dataset.map(_unpair, batched=True, remove_columns=_column_names(dataset), **map_kwargs)


def maybe_unpair_preference_dataset(
    dataset: DatasetOrDict, num_proc: int | None = None, desc: str | None = None
) -> DatasetOrDict:
    """Applies `unpair_preference_dataset` to datasets with `chosen` and `rejected`; returns others as they are.

    `num_proc` and `desc` are those of `Dataset.map`; streams take neither.
    """
    if not {"chosen", "rejected"} <= set(_column_names(dataset)):
        return dataset
    streamed = isinstance(dataset, (IterableDataset, IterableDatasetDict))
    return unpair_preference_dataset(dataset, **({} if streamed else {"num_proc": num_proc, "desc": desc}))


def _column_names(dataset: DatasetOrDict) -> list[str]:
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    return get_dataset_column_names(first)


def warn_of_balance(dataset: Dataset, desirable_weight: float, undesirable_weight: float) -> None:
    """Says so if all labels are the same, or if one kind outweighs the other more than the paper recommends.

    All good completions should weigh 1 to 4/3 times what all bad ones do, arXiv 2402.01306, Eq. 8. As in TRL, bounds
    are rounded to two digits, and datasets with as many good as bad completions are not judged.
    """
    labels = dataset.with_format(None)[LABEL]
    good = sum(map(bool, labels))
    bad = len(labels) - good
    if warn_of_one_label(dataset, "KTO") or good == bad:
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


def warn_of_one_label(dataset: Dataset, method: str) -> bool:
    """Says so if all labels are the same, and returns whether they are."""
    labels = dataset.with_format(None)[LABEL]
    same = len({bool(label) for label in labels}) == 1
    if same:
        logger.warning(
            f"The train dataset: all {len(labels)} labels are {bool(labels[0])}, so there is nothing to tell the "
            f"completions from. {method} learns from good and bad ones; check how the column 'label' was filled."
        )
    return same


def _tokenize(
    dataset: AnyDataset,
    columns: list[str],
    processing_class: PreTrainedTokenizerBase,
    image_reader: ImageReader | None,
    num_proc: int | None,
    name: str,
) -> AnyDataset:
    if {"chosen", "rejected"} <= set(columns):
        options = map_options(dataset, num_proc, f"Checking {name} dataset")
        dataset = dataset.map(_check_pair, with_indices=True, fn_kwargs={"name": name}, **options)
        dataset = maybe_unpair_preference_dataset(dataset, num_proc, f"Unpairing {name} dataset")
    arguments = {"processing_class": processing_class, "name": name, "format_version": FORMAT_VERSION}
    return map_rows(dataset, _tokenize_row, arguments, image_reader, num_proc, f"Tokenizing {name} dataset")


def _check_token_rows(dataset: Dataset, name: str) -> None:
    rows = dataset.select_columns([UNPAIRED_TOKEN_COLUMNS[1], LABEL]).with_format(None)
    for row, example in enumerate(rows):
        check_label(example[LABEL], row, name)
        if not example["completion_ids"]:
            raise ValueError(
                f"{place(name, row)}, column 'completion_ids': the completion has no tokens. "
                f"{remove_rows('completion_ids')}"
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
    image_reader: ImageReader | None = None,
) -> dict[str, list[int]]:
    check_unpaired_row(example, row, name, reads_images=image_reader is not None)
    check_tokenizer(processing_class, needs_eos=not is_conversational(example))
    if image_reader is not None:
        prompt_ids, completions = tokenize_with_images(example, ("completion",), image_reader, row, name)
        token_ids = dict(zip(UNPAIRED_TOKEN_COLUMNS, (prompt_ids, *completions), strict=True))
    else:
        with named_template_errors(example, processing_class, row, name):
            token_ids = tokenize_unpaired(example, processing_class)
    if not token_ids["completion_ids"]:
        raise ValueError(
            f"{place(name, row)}, column 'completion': the completion has no tokens after tokenization. Fill it, or "
            "remove the row."
        )
    return token_ids


def _unpair(batch: dict[str, list]) -> dict[str, list]:
    count = len(batch["chosen"])
    others = {name: values * 2 for name, values in batch.items() if name not in ("chosen", "rejected")}
    return {"completion": batch["chosen"] + batch["rejected"], "label": [True] * count + [False] * count, **others}


def _add_other_completions(examples: dict[str, list]) -> dict[str, list]:
    completions = examples["completion_ids"]
    return {KL_COLUMN: [*completions[-1:], *completions[:-1]]}


@dataclass
class UnpairedCollator(TreeCollator):
    """Collates rows with `prompt_ids`, `completion_ids` and `label` into a batch of a sequence a row.

    The arguments are those of `TreeCollator`. The labels ride along in `extras` of the `TokenBatch` as bool (S,),
    precomputed reference log-probabilities `ref_logps` and `ref_KL_logps` as float32 (S,). Where rows have
    `KL_completion_ids`, so do two more batches: `MISMATCHED`, of the prompts with those, and `BOTH`, where sequence 2i
    is row i's own and 2i + 1 the other one, which share their prompt. The entries are those of
    `DataCollatorForUnpairedPreference`.
    """

    def collate(self, examples: list[dict[str, Any]]) -> TokenBatch:
        images = self.read_images(examples)
        batch = self.pack(examples, "completion_ids", images=images)
        batch.extras.update(reference_logprobs(examples, (*UNPAIRED_REFERENCE_COLUMNS, PROMPT_WEIGHT)))
        batch.extras[LABEL] = torch.tensor([bool(row[LABEL]) for row in examples])
        if KL_COLUMN in examples[0]:
            both = self.pack(examples, "completion_ids", KL_COLUMN, images=images)
            both.extras[OWN_TOKENS] = (both.branch % 2 == 0).nonzero().flatten()
            batch.extras.update({MISMATCHED: self.pack(examples, KL_COLUMN, images=images), BOTH: both})
        return batch

    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        names = (*COMPLETION_ENTRIES, *(self.images.names(batch) if self.images else ()))
        mismatched = self._mismatched_names(batch.images) if MISMATCHED in batch.extras else ()
        return (*names, *mismatched, *(name for name in _NUMBERS if name in batch.extras))

    def _mismatched_names(self, images: Mapping[str, torch.Tensor] | None) -> tuple[str, ...]:
        """Returns the entries of the mismatched completions; what a model reads of their images is that of the own."""
        types = self.images.layout.type_names if self.images and images else ()
        return (*MISMATCHED_ENTRIES, *(MISMATCHED_PREFIX + name for name in types))

    def entries(self, batch: TokenBatch) -> dict[str, Any]:
        found = self.padded(batch, range(len(batch)))
        if MISMATCHED in batch.extras:
            mismatched = self.padded(batch.extras[MISMATCHED], range(len(batch)))
            prefixed = {MISMATCHED_PREFIX + name: value for name, value in mismatched.items()}
            found |= {name: prefixed[name] for name in self._mismatched_names(batch.images)}
        return {**found, **{name: batch.extras[name] for name in _NUMBERS if name in batch.extras}}

    def token_batch(self, entries: Mapping[str, Any]) -> TokenBatch:
        images = self.images.given(entries) if self.images else {}
        known = {*self._mismatched_names(images), *UNPAIRED_REFERENCE_COLUMNS, PROMPT_WEIGHT, *images}
        check_entries(entries, {*COMPLETION_ENTRIES, LABEL}, known)
        batch = completion_batch(*(entries[name] for name in COMPLETION_ENTRIES), branches=1, images=images or None)
        batch.extras.update({name: entries[name] for name in _NUMBERS if name in entries})
        batch.extras[LABEL] = batch.extras[LABEL].bool()
        if set(MISMATCHED_ENTRIES) <= set(entries):
            others = {name: entries.get(MISMATCHED_PREFIX + name, value) for name, value in images.items()}
            own = (entries[name] for name in MISMATCHED_ENTRIES)
            batch.extras[MISMATCHED] = completion_batch(*own, branches=1, images=others or None)
        return batch


@dataclass
class DataCollatorForUnpairedPreference(TensorCollator):
    """Collates rows as TRL's collator of the same name does, into tensors for a model's own forward.

    Rows have `prompt_ids`, `completion_ids` and `label`, and maybe `KL_completion_ids`, `ref_logps`, `ref_KL_logps`.
    Returns a dict of `input_ids`, `attention_mask` and `completion_mask` (S, T) int64, each sequence cut to
    `max_length`, padded on the right with `pad_token_id` to the longest, rounded up to `pad_to_multiple_of`; the same
    of the prompts with `KL_completion_ids` under names that begin with `KL_`; the reference's numbers (S,) float32;
    and `label` (S,) bool.
    """

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        collator = UnpairedCollator(
            self.pad_token_id, max_length=self.max_length, pad_to_multiple_of=self.pad_to_multiple_of
        )
        return collator(examples).copy()
