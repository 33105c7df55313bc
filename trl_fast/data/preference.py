"""Makes token trees, and batches of them, of preference pairs: datasets for DPO and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, PADDED
from trl_fast.settings.choices import TRUNCATION_MODES

from .attention_masks import strip_padding
from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset
from .dict_batch import DictCollator, check_entries
from .formats import is_conversational, maybe_extract_prompt
from .images.inputs import ImageInput
from .images.length_checks import check_images_are_kept
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.row_images import RowImages
from .images.tokenization import tokenize_with_images
from .packing import TokenBatch, pack_trees
from .padded_rows import COMPLETION_ENTRIES, completion_batch, padded_completions
from .row_checks import TOKEN_COLUMNS, check_preference_columns, check_preference_row
from .tensor_collator import TensorCollator
from .token_checks import check_completions
from .token_trees import Tree
from .tokenization import tokenize_completions
from .tokenizer_checks import check_tokenizer
from .truncation import cut_parts, drop_without_room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# The token ids of a row's third completion, which is learned.
GOLD_COLUMN = "reference_ids"

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 2


def prepare_preference_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    image_reader: ImageReader | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    others: tuple[str, ...] = (),
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Checks a preference dataset, tokenizes it, and drops the rows that truncation would leave without a completion.

    Rows have `chosen` and `rejected`, `prompt` or not, as text or as messages; the answer has the columns
    `prompt_ids`, `chosen_ids` and `rejected_ids` (int64 lists) beside the dataset's own. A dataset that has the three
    already is not tokenized again. Where the prompt was implicit, the text columns are split too.

    With `keep_start`, rows whose prompt fills `max_length` are dropped; the rest is cut when a batch is made.
    `max_prompt_length` and `max_completion_length` are older limits, in tokens: a longer prompt loses its beginning,
    a longer completion its end, before anything else is cut. Streams are tokenized and checked row by row as they are
    read. `num_proc` processes work on a Dataset.

    `others` are columns of further completions of the prompt, such as `reference`; the answer has `reference_ids`.
    Where the prompt is implicit, they begin with it too.

    `image_reader` reads images: those of the columns `images` (lists) or `image`, or in the messages, belong to the
    prompt. They stay in the dataset as they are stored, and no limit may cut them.

    Raises ValueError for bad data (see `checks`), naming the dataset `name` and the row.
    """
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(
            f"truncation_mode={truncation_mode!r} is unknown; expected one of {', '.join(TRUNCATION_MODES)}."
        )
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    other_ids = tuple(f"{column}_ids" for column in others)
    token_columns = (*TOKEN_COLUMNS, *other_ids)
    reads_images = image_reader is not None
    columns = check_preference_columns(dataset, name, token_columns, others=others, reads_images=reads_images)
    check_tokenizer(processing_class)
    dataset = strip_padding(dataset, token_columns, num_proc=num_proc, name=name)
    if not set(token_columns) <= set(columns):
        arguments = {"processing_class": processing_class, "name": name, "format_version": FORMAT_VERSION}
        arguments |= {"others": others} if others else {}
        dataset = map_rows(dataset, _tokenize_row, arguments, image_reader, num_proc, f"Tokenizing {name} dataset")
    completions = token_columns[1:]
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    if image_reader is not None:
        dataset = check_images_are_kept(
            dataset, image_reader.image_token_id, max_length, truncation_mode, max_prompt_length, name
        )
    dataset = cut_parts(dataset, completions, **limits, num_proc=num_proc, name=name)
    if isinstance(dataset, Dataset):
        check_completions(dataset, name, other_ids)
    if max_length is not None and truncation_mode == "keep_start":
        dataset = drop_without_room(dataset, max_length, num_proc, name)
    return dataset


# It is given to `map`, so it stands at module level: datasets pickles it for its worker processes and hashes it for
# its cache.


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    name: str,
    format_version: int,
    image_reader: ImageReader | None = None,
    others: tuple[str, ...] = (),
) -> dict[str, Any]:
    check_preference_row(example, row, name, others=others, reads_images=image_reader is not None)
    split = maybe_extract_prompt(example)
    changed_columns = {} if split is example else {**split, **_without_prompt(example, split, others, row, name)}
    split = {**example, **changed_columns}
    conversational = is_conversational(split)
    if conversational and len(split["prompt"]) == 0:
        raise ValueError(
            f"The {name} dataset, row {row}: 'chosen' and 'rejected' have no leading message in common, so there is "
            "no prompt. Add a 'prompt' column with the messages before the completions."
        )
    check_tokenizer(processing_class, needs_eos=not conversational)
    columns = ("chosen", "rejected", *others)
    if image_reader is not None:
        prompt_ids, completions = tokenize_with_images(split, columns, image_reader, row, name)
    else:
        with named_template_errors(split, processing_class, row, name):
            prompt_ids, completions = tokenize_completions(split, columns, processing_class)
    token_ids = {f"{column}_ids": ids for column, ids in zip(columns, completions, strict=True)}
    for column, ids in token_ids.items():
        if not ids:
            raise ValueError(
                f"The {name} dataset, row {row}, column {column!r}: the completion has no tokens after tokenization. "
                "Fill it, or remove the row."
            )
    return {**changed_columns, "prompt_ids": prompt_ids, **token_ids}


def _without_prompt(
    example: dict[str, Any], split: dict[str, Any], others: tuple[str, ...], row: int, name: str
) -> dict[str, Any]:
    """Returns further completions of a row without the prompt that was found in `chosen` and `rejected`."""
    prompt = split["prompt"]
    for column in others:
        if example[column][: len(prompt)] != prompt:
            raise ValueError(
                f"The {name} dataset, row {row}, column {column!r}: it does not begin with the prompt that 'chosen' "
                "and 'rejected' begin with. Add a 'prompt' column, or write the prompt before it too."
            )
    return {column: example[column][len(prompt) :] for column in others}


@dataclass
class TreeCollator(DictCollator):
    """Holds the settings of collators that pack a prompt and its completions as one tree a row.

    Each prompt + completion is cut to `max_length` tokens by `truncation_mode` (`keep_start` or `keep_end`). `layout`
    is one of `packing.LAYOUTS`; `pad_token_id` and `pad_to_multiple_of` matter where there is padding. `images` reads
    those of rows; None: they have none. `scores_prompts`: whether prompts are scored too, with their first completion.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    layout: str = PADDED
    images: RowImages | None = None
    scores_prompts: bool = False

    def read_images(self, examples: list[dict[str, Any]]) -> list[tuple[ImageInput, ...]]:
        """Returns what the model reads of the images of each row."""
        return [self.images.inputs(row) if self.images else () for row in examples]

    def pack(
        self, examples: list[dict[str, Any]], *columns: str, images: list[tuple[ImageInput, ...]] | None = None
    ) -> TokenBatch:
        """Packs the rows' prompts with the completions of the columns; a row's sequences are in their order.

        images: those of each row; None reads them here.
        """
        trees = [
            Tree(row["prompt_ids"], [row[column] for column in columns], own)
            for row, own in zip(examples, self.read_images(examples) if images is None else images, strict=True)
        ]
        multiple = BATCH_LAYOUTS[self.layout].padding_multiple(self.pad_to_multiple_of)
        how = (self.layout, self.pad_token_id, self.max_length, self.truncation_mode, multiple)
        image_layout = self.images.layout if self.images else None
        return pack_trees(trees, *how, scores_prompts=self.scores_prompts, image_layout=image_layout)

    def padded(self, batch: TokenBatch, order: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns `padded_rows.padded_completions` of the sequences of a batch, in that order, and their images."""
        sequences, lengths = batch.sequences(), batch.branch_lengths.tolist()
        found = padded_completions(
            [sequences[index] for index in order],
            [lengths[index] for index in order],
            self.pad_token_id,
            self.pad_to_multiple_of,
        )
        return found | (self.images.entries(batch, order, found["input_ids"]) if self.images else {})


def reference_logprobs(examples: list[dict[str, Any]], columns: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Returns those of the columns that the rows have, one number a row, float32."""
    return {
        column: torch.tensor([row[column] for row in examples], dtype=torch.float32)
        for column in columns
        if column in examples[0]
    }


@dataclass
class PreferenceCollator(TreeCollator):
    """Collates rows with `prompt_ids`, `chosen_ids` and `rejected_ids` into a batch of two sequences a row.

    Sequence 2i of the `TokenBatch` is row i's prompt followed by its chosen completion, sequence 2i + 1 by its
    rejected one; with further columns of completions there are as many more a row. The other arguments are those of
    `TreeCollator`. Precomputed reference log-probabilities,
    `ref_chosen_logps` and `ref_rejected_logps`, ride along in `extras` as float32 (P,). The entries are those of
    `DataCollatorForPreference`.
    """

    columns: tuple[str, ...] = TOKEN_COLUMNS[1:]

    def collate(self, examples: list[dict[str, Any]]) -> TokenBatch:
        batch = self.pack(examples, *self.columns)
        batch.extras.update(reference_logprobs(examples, REFERENCE_COLUMNS))
        return batch

    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        return (*COMPLETION_ENTRIES, *(self.images.names(batch) if self.images else ()), *batch.extras)

    def entries(self, batch: TokenBatch) -> dict[str, Any]:
        branches = len(self.columns)
        chosen_first = [number for branch in range(branches) for number in range(branch, len(batch), branches)]
        return {**self.padded(batch, chosen_first), **batch.extras}

    def token_batch(self, entries: Mapping[str, Any]) -> TokenBatch:
        images = self.images.given(entries) if self.images else {}
        check_entries(entries, set(COMPLETION_ENTRIES), {*REFERENCE_COLUMNS, *images})
        batch = completion_batch(
            *(entries[name] for name in COMPLETION_ENTRIES),
            branches=len(self.columns),
            scores_prompts=self.scores_prompts,
            images=images or None,
        )
        batch.extras.update({name: entries[name] for name in REFERENCE_COLUMNS if name in entries})
        return batch


@dataclass
class DataCollatorForPreference(TensorCollator):
    """Collates rows as TRL's collator of the same name does, into tensors for a model's own forward.

    Rows have `prompt_ids`, `chosen_ids` and `rejected_ids`, and maybe `ref_chosen_logps` and `ref_rejected_logps`.
    Returns a dict of `input_ids`, `attention_mask` and `completion_mask` (2P, T) int64, all chosen sequences before
    all rejected ones, each cut to `max_length` by `truncation_mode`, padded on the right with `pad_token_id` to the
    longest, rounded up to `pad_to_multiple_of`; and the reference's numbers (P,) float32.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        settings = self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        return PreferenceCollator(*settings)(examples).copy()


@dataclass
class DataCollatorForTriplePreference(TensorCollator):
    """Collates rows as TRL's collator of the same name does, into tensors for a model's own forward.

    Rows and the answer are those of `DataCollatorForPreference`, without the reference's numbers; with
    `include_reference` rows have `reference_ids` too, and the answer (3P, T) these sequences behind the rejected ones.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    include_reference: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        settings = self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        columns = (*TOKEN_COLUMNS[1:], GOLD_COLUMN) if self.include_reference else TOKEN_COLUMNS[1:]
        return PreferenceCollator(*settings, columns=columns)(examples).copy()
