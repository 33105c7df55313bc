"""Makes pairs of whole token sequences, and batches of them, of preference pairs: data for reward models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, PADDED

from .attention_masks import strip_padding
from .conversation_checks import named_template_errors
from .dataset_types import AnyDataset, map_options
from .dict_batch import DictCollator, check_entries
from .images.inputs import ImageInput
from .images.layout import ImageLayout
from .images.preparation import map_rows, with_images
from .images.reader import ImageReader
from .images.row_images import RowImages
from .images.tokenization import tokenize_sequences_with_images
from .packing import TokenBatch, pack_trees
from .padded_rows import SEQUENCE_ENTRIES, completion_batch, padded_sequences
from .row_checks import check_margin, check_preference_columns, check_preference_row
from .row_places import place
from .tensor_collator import TensorCollator
from .token_checks import check_completions
from .token_trees import Tree
from .tokenization import common_prefix_length, end_with, template_options
from .tokenizer_checks import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEQUENCE_COLUMNS = ("chosen_ids", "rejected_ids")
MARGIN = "margin"
# The extra of a TokenBatch that tells where each sequence's reward is read.
REWARD_POSITIONS = "reward_positions"
# Tokenized data's columns in older versions of TRL, up to 1.x and up to 0.24, and their present names.
_OLDER_COLUMNS = (
    {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"},
    {"input_ids_chosen": "chosen_ids", "input_ids_rejected": "rejected_ids"},
)
_OLDER_MASKS = {
    "attention_mask_chosen": "chosen_attention_mask",
    "attention_mask_rejected": "rejected_attention_mask",
}

# Part of the cache's key: datasets hashes a module's function by its name, not by its code. Count it up whenever rows
# come out differently.
FORMAT_VERSION = 2


def tokenize_reward(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Returns the token ids of prompt + chosen and of prompt + rejected: `chosen_ids` and `rejected_ids`.

    Messages go through the chat template, with the row's `tools` (a list, or one as JSON) and `chat_template_kwargs`.
    Text gets the tokenizer's default special tokens, and the EOS token if it does not end with it. A `prompt` of text
    beside completions that are messages is ignored, since those begin with it.
    """
    prompt, options = example.get("prompt"), template_options(example)

    def tokenize(completion: str | list[dict]) -> list[int]:
        if isinstance(completion, str):
            return processing_class(text=(prompt or "") + end_with(completion, processing_class.eos_token))[
                "input_ids"
            ]
        messages = [*(prompt if isinstance(prompt, list) else []), *completion]
        encoded: Any = processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        return encoded["input_ids"]

    return {"chosen_ids": tokenize(example["chosen"]), "rejected_ids": tokenize(example["rejected"])}


def prepare_reward_dataset(
    dataset: AnyDataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    image_reader: ImageReader | None = None,
    max_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> AnyDataset:
    """Checks a preference dataset, tokenizes it, and drops rows with a side of more than `max_length` tokens.

    Rows have `chosen` and `rejected`, `prompt` or not, as text or as messages, and maybe a number `margin`; the answer
    has the columns `chosen_ids` and `rejected_ids` (int64 lists) beside the dataset's own. A dataset that has the two
    already is not tokenized again. Streams are tokenized, checked and filtered row by row as they are read. `num_proc`
    processes work on a Dataset. `image_reader` is that of `preference.prepare_preference_dataset`.

    Raises ValueError for bad data, naming the dataset `name` and the row, and if no row is short enough.
    """
    dataset = _with_present_names(dataset)
    dataset, image_reader = with_images(dataset, image_reader, num_proc=num_proc, name=name)
    columns = check_preference_columns(dataset, name, SEQUENCE_COLUMNS, reads_images=image_reader is not None)
    check_tokenizer(processing_class)
    dataset = strip_padding(dataset, SEQUENCE_COLUMNS, num_proc=num_proc, name=name)
    if not set(SEQUENCE_COLUMNS) <= set(columns):
        arguments = {"processing_class": processing_class, "name": name, "format_version": FORMAT_VERSION}
        dataset = map_rows(dataset, _tokenize_row, arguments, image_reader, num_proc, f"Tokenizing {name} dataset")
    elif "prompt_ids" in columns:
        raise ValueError(
            f"The {name} dataset has the column 'prompt_ids' beside 'chosen_ids' and 'rejected_ids', as DPO takes it; "
            "a reward model reads whole sequences. Put prompt_ids before the two others, and remove the column."
        )
    elif isinstance(dataset, Dataset) and MARGIN in columns:
        _check_margins(dataset, name)
    if isinstance(dataset, Dataset):
        check_completions(dataset, name)
    return dataset if max_length is None else _short_enough(dataset, max_length, num_proc, name)


def _with_present_names(dataset: AnyDataset) -> AnyDataset:
    columns = set(dataset.column_names or [])
    older = next((names for names in _OLDER_COLUMNS if names.keys() <= columns), None)
    if older is None or set(SEQUENCE_COLUMNS) <= columns:
        return dataset
    first, second = older
    warnings.warn(
        f"The columns `{first}` and `{second}` are names of an older TRL; they work, and `chosen_ids` and "
        "`rejected_ids` are the present names.",
        FutureWarning,
        stacklevel=2,
    )
    masks = {old: new for old, new in _OLDER_MASKS.items() if old in columns}
    return dataset.rename_columns({**older, **masks})


def _short_enough(dataset: AnyDataset, max_length: int, num_proc: int | None, name: str) -> AnyDataset:
    options = map_options(dataset, num_proc, f"Leaving out long rows of {name} dataset")
    kept = dataset.filter(_is_short_enough, fn_kwargs={"max_length": max_length}, **options)
    if not isinstance(dataset, Dataset) or len(kept) == len(dataset):
        return kept
    what = f"'chosen' or 'rejected' has more than max_length={max_length} tokens, prompt included"
    remedy = "A reward belongs to the whole text, so nothing is cut; raise max_length, or set it to None."
    if len(kept) == 0:
        raise ValueError(f"The {name} dataset is empty: in every row {what}. {remedy}")
    logger.warning(
        f"The {name} dataset: {len(dataset) - len(kept)} of {len(dataset)} rows are left out, because {what}. {remedy}"
    )
    return kept


def _check_margins(dataset: Dataset, name: str) -> None:
    for row, margin in enumerate(dataset.with_format(None)[MARGIN]):
        check_margin(margin, row, name)


# The functions given to `map` and `filter` stand at module level: datasets pickles them for its worker processes and
# hashes them for its cache.


def _tokenize_row(
    example: dict[str, Any],
    row: int,
    processing_class: PreTrainedTokenizerBase,
    name: str,
    format_version: int,
    image_reader: ImageReader | None = None,
) -> dict[str, list[int]]:
    # An empty answer has a reward too; of two there is none to prefer.
    check_preference_row(example, row, name, one_may_be_empty=True, reads_images=image_reader is not None)
    check_tokenizer(processing_class, needs_eos=isinstance(example["chosen"], str))
    if MARGIN in example:
        check_margin(example[MARGIN], row, name)
    if image_reader is not None:
        token_ids = tokenize_sequences_with_images(example, image_reader, row, name)
        _check_images_are_shared(token_ids, image_reader.image_token_id, row, name)
        return token_ids
    with named_template_errors(example, processing_class, row, name):
        return tokenize_reward(example, processing_class)


def _check_images_are_shared(token_ids: dict[str, list[int]], image_token_id: int, row: int, name: str) -> None:
    """Raises ValueError if one of the sequences has an image behind the place where they begin to differ."""
    shared = common_prefix_length(*token_ids.values())
    for column, ids in token_ids.items():
        if image_token_id in ids[shared:]:
            raise ValueError(
                f"{place(name, row)}, column {column.removesuffix('_ids')!r}: an image stands behind the place where "
                "'chosen' and 'rejected' begin to differ; images belong to the prompt, which both have in common."
            )


def _is_short_enough(example: dict[str, Any], max_length: int) -> bool:
    return all(len(example[column]) <= max_length for column in SEQUENCE_COLUMNS)


def reward_batch(
    pairs: Sequence[tuple[list[int], list[int]]],
    layout: str,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    margins: Sequence[float] | None = None,
    *,
    images: Sequence[tuple[ImageInput, ...]] | None = None,
    image_layout: ImageLayout | None = None,
) -> TokenBatch:
    """Lays out pairs of chosen and rejected token ids as one batch (see `pack_trees`), each pair's prefix once.

    `extras["reward_positions"]` (S,) int64 are the flat positions of the last tokens, which the rewards are read from;
    `extras["margin"]` (P,) float32 are the margins, if there are any. Tokens `pad_token_id` at a sequence's end do not
    count as last ones: that is how transformers finds the last token, which matters where the pad token is the EOS
    token. `images` are those of each pair, in what both sequences begin with, and `image_layout` says how the model
    wants to have them.
    """
    trees = []
    for pair, own in zip(pairs, images or [()] * len(pairs), strict=True):
        shared = common_prefix_length(*pair)
        trees.append(Tree(pair[0][:shared], [ids[shared:] for ids in pair], own))
    batch = pack_trees(trees, layout, pad_token_id, pad_to_multiple_of=pad_to_multiple_of, image_layout=image_layout)
    places = batch.by_sequence(torch.arange(batch.input_ids.numel()).view_as(batch.input_ids))
    last = [_last_index(ids, pad_token_id) for pair in pairs for ids in pair]
    batch.extras[REWARD_POSITIONS] = torch.stack([place[index] for place, index in zip(places, last, strict=True)])
    if margins is not None:
        batch.extras[MARGIN] = torch.tensor(margins, dtype=torch.float32)
    return batch


def _last_index(ids: list[int], pad_token_id: int) -> int:
    return next((index for index in reversed(range(len(ids))) if ids[index] != pad_token_id), 0)


@dataclass
class RewardCollator(DictCollator):
    """Collates rows with `chosen_ids`, `rejected_ids` and maybe `margin` into a batch (see `reward_batch`).

    The entries are those of `DataCollatorForReward`.
    """

    lays_out_entries = True
    pad_token_id: int
    layout: str = PADDED
    pad_to_multiple_of: int | None = None
    images: RowImages | None = None

    def collate(self, examples: list[dict[str, Any]]) -> TokenBatch:
        pairs = [(row["chosen_ids"], row["rejected_ids"]) for row in examples]
        margins = [row[MARGIN] for row in examples] if MARGIN in examples[0] else None
        return self._lay_out(pairs, margins, [self.images.inputs(row) for row in examples] if self.images else None)

    def _lay_out(
        self,
        pairs: list[tuple[list[int], list[int]]],
        margins: list[float] | None,
        images: list[tuple[ImageInput, ...]] | None = None,
    ) -> TokenBatch:
        multiple = BATCH_LAYOUTS[self.layout].padding_multiple(self.pad_to_multiple_of)
        kind = self.images.layout if self.images else None
        how = (self.layout, self.pad_token_id, multiple, margins)
        return reward_batch(pairs, *how, images=images, image_layout=kind)

    def names(self, batch: TokenBatch) -> tuple[str, ...]:
        return (*SEQUENCE_ENTRIES, *(batch.images or ()), *((MARGIN,) if MARGIN in batch.extras else ()))

    def entries(self, batch: TokenBatch) -> dict[str, Any]:
        sequences = batch.sequences()
        chosen_first = [*sequences[0::2], *sequences[1::2]]
        found = padded_sequences(chosen_first, self.pad_token_id, self.pad_to_multiple_of)
        if self.images:
            order = [*range(0, len(sequences), 2), *range(1, len(sequences), 2)]
            found |= self.images.entries(batch, order, found["input_ids"])
        return {**found, MARGIN: batch.extras[MARGIN]} if MARGIN in batch.extras else found

    def token_batch(self, entries: Mapping[str, Any]) -> TokenBatch:
        images = self.images.given(entries) if self.images else {}
        check_entries(entries, set(SEQUENCE_ENTRIES), {MARGIN, *images})
        ids, mask = (entries[name] for name in SEQUENCE_ENTRIES)
        if len(ids) % 2:
            raise ValueError(
                f"The batch has {len(ids)} rows; expected those of all chosen sequences before those of all rejected "
                "ones"
            )
        if images:
            return self._rows_with_images(ids, mask, images, entries.get(MARGIN))
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        half = len(rows) // 2
        pairs = [*zip(rows[:half], rows[half:], strict=True)]
        batch = self._lay_out(pairs, entries[MARGIN].tolist() if MARGIN in entries else None)
        return batch.to(ids.device)

    def _rows_with_images(
        self, ids: torch.Tensor, mask: torch.Tensor, images: dict[str, torch.Tensor], margins: torch.Tensor | None
    ) -> TokenBatch:
        """Returns padded rows (2P, T) with images, of all chosen sequences before all rejected ones, as they are."""
        batch = completion_batch(ids, mask, torch.zeros_like(mask), branches=2, images=images)
        width = ids.shape[1]
        last = [_last_index(row, self.pad_token_id) for row in ids.tolist()]
        ends = torch.tensor(last, device=ids.device) + torch.arange(len(ids), device=ids.device) * width
        batch.extras[REWARD_POSITIONS] = ends.view(2, -1).T.flatten()
        if margins is not None:
            batch.extras[MARGIN] = margins
        return batch


@dataclass
class DataCollatorForReward(TensorCollator):
    """Collates rows as TRL's `reward_trainer.DataCollatorForPreference` does, for a model's own forward.

    Rows have `chosen_ids` and `rejected_ids`, and maybe `margin`. Returns a dict of `input_ids` and `attention_mask`
    (2P, T) int64, all chosen sequences before all rejected ones, padded on the right with `pad_token_id` to the
    longest, rounded up to `pad_to_multiple_of`; and `margin` (P,) float32.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch."""
        sequences = [torch.tensor(row[column]) for column in SEQUENCE_COLUMNS for row in examples]
        output = padded_sequences(sequences, self.pad_token_id, self.pad_to_multiple_of)
        if MARGIN in examples[0]:
            output[MARGIN] = torch.tensor([row[MARGIN] for row in examples], dtype=torch.float32)
        return output
