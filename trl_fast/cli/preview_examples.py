"""Prepares examples as a trainer does, without a model's weights; finds which tokens are learned and which are cut."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import datasets
import torch
from datasets import Dataset

from trl_fast.data import AnyDataset, TokenBatch
from trl_fast.data.assistant_turns import split_turns
from trl_fast.data.images.columns import load_images
from trl_fast.data.images.reader import ImageReader
from trl_fast.data.preference import GOLD_COLUMN
from trl_fast.data.prompt_completion import COMPLETION_IDS
from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.data.reward_modeling import REWARD_POSITIONS, SEQUENCE_COLUMNS
from trl_fast.data.row_checks import TOKEN_COLUMNS
from trl_fast.data.sft_batch import IGNORED
from trl_fast.data.tokenization import common_prefix_length
from trl_fast.data.unpaired_preference import KL_COLUMN, LABEL, MISMATCHED
from trl_fast.modeling.layouts import declared_layout
from trl_fast.modeling.loading import build_without_weights
from trl_fast.settings.batch_layouts import PADDED
from trl_fast.settings.choices import SEPARATELY
from trl_fast.trainers.base.argument_checks import check_settings
from trl_fast.trainers.base.model_setup import layout_request
from trl_fast.trainers.methods import Method
from trl_fast.trainers.online.trainer import OnlineTrainer

from .preview_tokens import CONTEXT, CUT, LEARNED, PlacedImage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trl_fast.trainers.base.config import BaseConfig

# The column that tells from which row of the dataset a prepared row is.
_ROW = "trl_fast_row"
# The settings that cut, and the value with which nothing is.
_LIMITS = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
_IN_ORDER = {"packing": False, "shuffle_dataset": False}
# Why a method drops rows.
DROPPED_BECAUSE = {
    "sft": "no token to learn within max_length",
    "dpo": "the prompt alone fills max_length",
    "kto": "the prompt alone fills max_length",
    "bco": "the prompt alone fills max_length",
    "orpo": "the prompt alone fills max_length",
    "cpo": "the prompt alone fills max_length",
    "tpo": "the prompt alone fills max_length",
    "reward": "chosen or rejected is longer than max_length",
}
_NAMES = {
    "prompt_ids": "prompt",
    "chosen_ids": "chosen",
    "rejected_ids": "rejected",
    "completion_ids": "completion",
    GOLD_COLUMN: "gold",
    KL_COLUMN: "completion of another row",
}


@dataclass(frozen=True)
class Part:
    """Holds a part of an example, such as its prompt, with a kind for each token.

    - `ids`, `kinds`: all tokens, those that are cut away too.
    - `position`: the position of the first token that is kept.
    - `note`: what else is to be said of it.
    - `images`: those whose tokens are among the ids, in order.
    """

    name: str
    ids: list[int]
    kinds: list[str]
    position: int = 0
    note: str = ""
    images: tuple[PlacedImage, ...] = ()

    @property
    def kept(self) -> int:
        """Counts the tokens that are not cut away."""
        return len(self.kinds) - self.kinds.count(CUT)

    def split(self, at: int, first: str, second: str) -> list[Part]:
        """Returns the tokens before and from an index on as two parts of these names."""
        before = dataclasses.replace(self, name=first, ids=self.ids[:at], kinds=self.kinds[:at])
        position = self.position + before.kept
        return [before, Part(second, self.ids[at:], self.kinds[at:], position, self.note)]


@dataclass(frozen=True)
class Example:
    """Holds an example as it is trained on: its parts, the batch of it alone, and names of the batch's sequences."""

    row: int | None
    parts: list[Part]
    batch: TokenBatch | None
    names: list[str]


class Examples:
    """Holds the first rows of a dataset as a trainer prepares them; no weights of the model are loaded.

    Attributes:
        rows: how many rows of the dataset were read.
        total: how many it has; None: it is a stream.
        tokenizer: as the trainer has it.
        prepared: what the trainer trains on.
        uncut: the same rows, in the dataset's order, before anything is cut, dropped or packed.
        layout: that of the trainer's batches, by what the model declares.
        has_turns: whether a row holds a sequence for each turn of the assistant.
        is_packed: whether a row holds several rows of the dataset.

    Raises:
        ValueError, TypeError, OSError: what training raises for this data, model or setting.
    """

    def __init__(self, method: Method, args: BaseConfig, model: str, dataset: AnyDataset, rows: int | None) -> None:
        trainer_class = method.trainer_class()
        # Only the parts that make data are used, and they need no constructor.
        self.trainer = trainer_class.__new__(trainer_class)
        check_settings(args)
        self.method = method.name
        # Of the method's own class.
        self.args: Any = args
        given: Any = args.model_init_kwargs or {}
        options = {"trust_remote_code": args.trust_remote_code, **given}
        self.model = build_without_weights(model, classifier=method.name == "reward", **options)
        self.tokenizer: PreTrainedTokenizerBase = self.trainer.resolve_tokenizer(None, self.model, self.args)
        first = _first_rows(dataset, rows)
        self.rows = len(first)
        self.total = len(dataset) if isinstance(dataset, Dataset) else None
        self.prepared = self._prepare(first, self.args)
        self.uncut = self._uncut(first)
        self.has_turns = getattr(self.args, "assistant_turns", None) == SEPARATELY
        packed = getattr(self.args, "packing", False) or "seq_lengths" in self.prepared.column_names
        self.is_packed = packed and not self.has_turns
        request = layout_request(self.trainer, self.model, self.args)
        self.layout = declared_layout(self.model, request, self.trainer.readout)

    def _prepare(self, dataset: Dataset, args: BaseConfig) -> Dataset:
        with _without_bars():
            try:
                return self.trainer.prepare_datasets(_numbered(dataset), None, self.tokenizer, args, self.model)[0]
            except (ValueError, TypeError):
                # What training says does not know of the column.
                self.trainer.prepare_datasets(dataset, None, self.tokenizer, args, self.model)
                raise

    def _uncut(self, dataset: Dataset) -> Dataset:
        args = copy.copy(self.args)
        for name, value in {**_LIMITS, **_IN_ORDER}.items():
            if hasattr(args, name):
                setattr(args, name, value)
        with _without_warnings(), _without_bars():
            return self.trainer.prepare_dataset(_numbered(dataset), self.tokenizer, args, "train")

    @functools.cached_property
    def collator(self) -> Any:
        """Returns the trainer's collator; None for methods that sample their completions."""
        return self._collator(self.args, self.layout)

    def _collator(self, args: BaseConfig, layout: str) -> Any:
        if self.is_online:
            return None
        return self.trainer.make_collator(self.model, self.tokenizer.pad_token_id, layout, args)

    def _counting_collator(self, args: BaseConfig, layout: str) -> Any:
        """Returns a collator that makes no pixels of images: their tokens are among the ids."""
        made = self._collator(args, layout)
        return made and dataclasses.replace(made, images=None)

    @property
    def is_online(self) -> bool:
        """Says whether the method samples completions, so that rows are prompts, some of them with an answer too."""
        return isinstance(self.trainer, OnlineTrainer)

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns of token ids that a row's parts are made of, the prompt first."""
        columns = self.prepared.column_names
        known = (PROMPT_IDS, *TOKEN_COLUMNS[1:], GOLD_COLUMN, "completion_ids", KL_COLUMN)
        return tuple(name for name in known if name in columns)

    @functools.cached_property
    def _places(self) -> dict[int, list[int]]:
        """Returns where the prepared rows of each row of the dataset are."""
        found: dict[int, list[int]] = {}
        for place, row in enumerate(self.prepared[_ROW]):
            found.setdefault(row, []).append(place)
        return found

    @property
    def dropped(self) -> list[int]:
        """Lists the rows of the dataset that are not trained on; none are known of where rows are packed."""
        return [] if self.is_packed else sorted({*range(self.rows)} - {*self._places})

    def of_row(self, row: int) -> list[Example]:
        """Returns the examples of a row of the dataset: none if it is dropped, two where a pair becomes two rows.

        Where rows are packed, it is the packed row of that number.

        Raises:
            ValueError: there is no such row.
        """
        known = len(self.prepared) if self.is_packed else self.rows
        if not 0 <= row < known:
            packed = "packed " if self.is_packed else ""
            raise ValueError(f"row={row}: there are {known} {packed}rows here; expected one from 0 to {known - 1}")
        if self.is_packed:
            return [self._packed(self.prepared[row])]
        whole = [index for index, number in enumerate(self.uncut[_ROW]) if number == row]
        places = self._places.get(row, [])
        found = []
        for place, index in zip(places, whole, strict=False):
            prepared = self.prepared[place]
            found.append(self._with_images(self._example(row, prepared, self.uncut[index]), prepared))
        return found

    def _example(self, row: int, prepared: dict[str, Any], uncut: dict[str, Any]) -> Example:
        if self.is_online:
            prompt, kept = list(uncut[PROMPT_IDS]), list(prepared[PROMPT_IDS])
            parts = [_part("prompt", prompt, kept, {*()}, 0)]
            if given := list(prepared.get(COMPLETION_IDS, ())):
                parts.append(_part("completion", given, given, {*range(len(given))}, len(kept)))
            return Example(row, parts, None, [])
        batch = self.collator.collate([prepared])
        if self.has_turns:
            return self._turns(row, batch, uncut, prepared)
        if "input_ids" in prepared:
            parts = self._labelled(batch, uncut, prepared)
            return Example(row, parts, batch, ["the row"])
        if self.method == "reward":
            return Example(row, self._compared(batch, uncut), batch, ["chosen", "rejected"])
        return self._tree(row, batch, prepared, uncut)

    def _with_images(self, example: Example, prepared: dict[str, Any]) -> Example:
        """Returns the example with the row's images at their places."""
        if self.trainer.images is None:
            return example
        placed = _place_images(example.parts, self.trainer.images.reader, prepared, has_turns=self.has_turns)
        return dataclasses.replace(example, parts=placed)

    def _labelled(self, batch: TokenBatch, uncut: dict[str, Any], prepared: dict[str, Any]) -> list[Part]:
        """Returns a row's prompt and completion where labels tell them apart, else the row."""
        name = "conversation" if {"messages", "conversations"} & uncut.keys() else "text"
        whole, kept = list(uncut["input_ids"]), list(prepared["input_ids"])
        part = _part(name, whole, kept, _scored(batch, 0), 0, mode=self.args.truncation_mode)
        start = next((index for index, label in enumerate(uncut.get("labels", whole)) if label != IGNORED), 0)
        return part.split(start, "prompt", "completion") if start and "completion" in uncut else [part]

    def _turns(self, row: int, batch: TokenBatch, uncut: dict[str, Any], prepared: dict[str, Any]) -> Example:
        """Makes an example of the assistant's turns, each with what stands before it; some may be cut away whole."""
        kept, parts = split_turns(prepared), []
        limit = slice(None, self.args.max_length)
        if self.args.truncation_mode == "keep_end" and self.args.max_length is not None:
            limit = slice(-self.args.max_length, None)
        for number, (whole, _) in enumerate(split_turns(uncut), start=1):
            ids, labels = kept.pop(0) if kept and kept[0][0] == whole[limit] else ([], [])
            learned = {index for index, label in enumerate(labels) if label != IGNORED and index}
            parts.append(_part(f"turn {number}", whole, ids, learned, 0, mode=self.args.truncation_mode))
        # Turns that go on from each other are one sequence of the batch.
        names = [part.name for part in parts if part.kept]
        if len(names) > len(batch):
            names = [f"sequence {number}" for number in range(1, len(batch) + 1)]
        return Example(row, parts, batch, names)

    def _packed(self, prepared: dict[str, Any]) -> Example:
        """Makes an example of a row that holds several; those that follow each other are its parts."""
        batch = self.collator.collate([prepared])
        texts = [text.tolist() for text in batch.sequences()]
        learned = [_scored(batch, number) for number in range(len(texts))]
        names = [f"example {number}" for number in range(1, len(texts) + 1)]
        parts = [_part(name, ids, ids, kept, 0) for name, ids, kept in zip(names, texts, learned, strict=True)]
        return Example(None, parts, batch, names)

    def _compared(self, batch: TokenBatch, uncut: dict[str, Any]) -> list[Part]:
        """Returns what two texts of a reward model begin with, and the rest of each, whose last token is read."""
        chosen, rejected = (list(uncut[column]) for column in SEQUENCE_COLUMNS)
        shared = common_prefix_length(chosen, rejected)
        cells = torch.arange(batch.input_ids.numel()).view_as(batch.input_ids)
        # Positions of the model are others where an image has those of its rows and columns.
        places = zip(batch.by_sequence(cells), batch.extras[REWARD_POSITIONS], strict=True)
        positions = [int((own == place).nonzero()) for own, place in places]
        parts = [_part("what both begin with", chosen[:shared], chosen[:shared], set(), 0)]
        for name, ids, position in zip(("chosen", "rejected"), (chosen, rejected), positions, strict=True):
            note = f"the reward is read at position {position}"
            parts.append(_part(name, ids[shared:], ids[shared:], {position - shared}, shared, note=note))
        return parts

    def _tree(self, row: int, batch: TokenBatch, prepared: dict[str, Any], uncut: dict[str, Any]) -> Example:
        """Makes an example of a prompt and its completions."""
        prompt_column, *columns = self.columns
        names = [_NAMES[column] for column in columns]
        scored, lengths = _branches(batch)
        if KL_COLUMN in columns:
            more, more_lengths = _branches(batch.extras[MISMATCHED])
            # Nothing is learned of it: it is scored without gradient.
            scored, lengths = [*scored, (more[0][0], more[0][1], set())], [*lengths, *more_lengths]
        longest = max(range(len(columns)), key=lambda index: len(scored[index][0]))
        mode, kept_prompt = self.args.truncation_mode, scored[longest][0]
        cuts_start = mode == "keep_end" or getattr(self.args, "max_prompt_length", None) is not None
        how = "keep_end" if cuts_start else "keep_start"
        # Of a method that learns prompts, they come with the first completion.
        of_prompt = {len(scored[0][0]) + index for index in scored[0][2] if index < 0} if longest == 0 else set()
        parts = [_part("prompt", list(uncut[prompt_column]), kept_prompt, of_prompt, 0, mode=how)]
        for column, name, (prompt, completion, learned) in zip(columns, names, scored, strict=True):
            note = "" if len(prompt) == len(kept_prompt) else f"of its prompt the last {len(prompt)} tokens are kept"
            if column == KL_COLUMN:
                note = "scored without gradient, for the KL estimate"
            whole = list(uncut[column]) if column != KL_COLUMN else list(prepared[column])
            parts.append(_part(name, whole, completion, learned, len(prompt), mode=mode, note=note))
        if LABEL in prepared:
            parts[1] = dataclasses.replace(parts[1], note=f"label {bool(prepared[LABEL])}")
        return Example(row, parts, batch, names[: len(batch)])

    # ---- the summary

    def batches(self, size: int) -> Iterator[tuple[TokenBatch, TokenBatch]]:
        """Yields batches of so many rows in the prepared order, in the trainer's layout and in padded rows."""
        ours, padded = (self._counting_collator(self.args, layout) for layout in (self.layout, PADDED))
        for start in range(0, len(self.prepared), size):
            rows = [self.prepared[place] for place in range(start, min(start + size, len(self.prepared)))]
            yield ours.collate(rows), padded.collate(rows)

    def lengths(self) -> dict[str, list[int]]:
        """Returns the tokens of each part of each row, before anything is cut."""
        rows = self.uncut
        if self.has_turns:
            return {"a turn with its context": [length for lengths in rows["seq_lengths"] for length in lengths]}
        names = ("input_ids", *SEQUENCE_COLUMNS) if self.method == "reward" else ("input_ids", *self.columns)
        found = {
            _NAMES.get(name, "the row"): [len(ids) for ids in rows[name]]
            for name in names
            if name in rows.column_names and name != KL_COLUMN
        }
        if "prompt" in found and len(found) > 1:
            completions = [counts for name, counts in found.items() if name != "prompt"]
            longest = [max(each) for each in zip(*completions, strict=True)]
            found["prompt + longest"] = [sum(each) for each in zip(found["prompt"], longest, strict=True)]
        return found

    def tokens_of_rows(self) -> tuple[dict[int, int], dict[int, int], int]:
        """Returns the tokens of each row of the dataset before and after cutting, and how many of the latter count.

        Those that count are learned; of a reward model they are the tokens at which a reward is read.
        """
        whole_args = copy.copy(self.args)
        whole_args.max_length = None
        before = self._counts(self.uncut, self._counting_collator(whole_args, self.layout))
        after = self._counts(self.prepared, self._counting_collator(self.args, self.layout))
        return before[0], after[0], after[1]

    def _counts(self, rows: Dataset, collator: Any) -> tuple[dict[int, int], int]:
        tokens: dict[int, int] = {}
        learned = 0
        for index, row in enumerate(rows):
            number = row.get(_ROW, index)
            if collator is None:
                tokens[number] = tokens.get(number, 0) + len(row[PROMPT_IDS])
                continue
            batch = collator.collate([row])
            tokens[number] = tokens.get(number, 0) + batch.num_tokens
            learned += len(batch) if self.method == "reward" else len(batch.targets)
        return tokens, learned


def _first_rows(dataset: AnyDataset, rows: int | None) -> Dataset:
    """Returns the first rows of a dataset, or of a stream, which is read only so far; None: all of them."""
    if isinstance(dataset, Dataset):
        return dataset if rows is None or len(dataset) <= rows else dataset.select(range(rows))
    return Dataset.from_list(list(dataset if rows is None else dataset.take(rows)))


def _numbered(dataset: Dataset) -> Dataset:
    """Returns the dataset with the numbers of its rows in a column."""
    return dataset.add_column(_ROW, list(range(len(dataset))))


def _branches(batch: TokenBatch) -> tuple[list[tuple[list[int], list[int], set[int]]], list[int]]:
    """Returns prompt, completion and the completion's learned tokens by index of each sequence, and their lengths."""
    found = []
    lengths = batch.branch_lengths.tolist()
    for number, (ids, length) in enumerate(zip(batch.sequences(), lengths, strict=True)):
        start = len(ids) - length
        found.append((ids[:start].tolist(), ids[start:].tolist(), _scored(batch, number)))
    return found, lengths


def _scored(batch: TokenBatch, sequence: int) -> set[int]:
    """Returns which tokens of a sequence's completion are scored, counted from its start."""
    return {*batch.offset[batch.branch == sequence].tolist()}


def _part(
    name: str,
    whole: list[int],
    kept: list[int],
    learned: set[int],
    position: int,
    *,
    mode: str = "keep_end",
    note: str = "",
) -> Part:
    """Makes a part of the tokens before cutting, those that are kept, and which of the latter are learned."""
    start = _place_of(kept, whole, from_end=mode == "keep_end")
    kinds = [CUT] * len(whole)
    kinds[start : start + len(kept)] = [LEARNED if index in learned else CONTEXT for index in range(len(kept))]
    return Part(name, whole, kinds, position, note)


def _place_images(parts: Sequence[Part], reader: ImageReader, row: dict[str, Any], *, has_turns: bool) -> list[Part]:
    """Returns the parts with a prepared row's images; has_turns: each begins anew, they do not follow the first."""
    pictures = load_images(row)
    counts = [reader.image_input(picture).num_tokens for picture in pictures]
    found, seen = [], 0
    for part in parts:
        tokens = [index for index, token in enumerate(part.ids) if token == reader.image_token_id]
        firsts = [first - seen for first in accumulate(counts[:-1], initial=0)]
        images = tuple(
            # Some processors put other tokens between the rows of an image.
            PlacedImage(picture, tokens[first], tokens[first + count - 1] + 1)
            for picture, first, count in zip(pictures, firsts, counts, strict=False)
            if 0 <= first < len(tokens)
        )
        found.append(dataclasses.replace(part, images=images))
        if part is parts[0] and not has_turns:
            seen = len(tokens)
    return found


def _place_of(kept: Sequence[int], whole: Sequence[int], *, from_end: bool) -> int:
    """Returns where a run of tokens is in the tokens that it was cut from."""
    places = range(len(whole) - len(kept) + 1)
    ordered = reversed(places) if from_end else places
    return next(place for place in ordered if whole[place : place + len(kept)] == kept)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Shows no progress bars of `datasets`: what is prepared here is small."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Drops warnings that have been given once already."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
