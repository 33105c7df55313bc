"""Reads rows of preference data of every format into one form, which the checks look at."""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..conversation_checks import check_content
from ..dataset_types import AnyDataset
from ..formats import is_conversational, maybe_extract_prompt
from ..images.columns import IMAGE_COLUMNS
from ..question_columns import QUESTION_COLUMNS
from ..row_checks import check_preference_columns, check_preference_row
from ..tokenization import template_options
from .findings import quote
from .image_facts import RecordImages, read_images

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..images.reader import ImageReader

LABELLED_COLUMNS = ("prompt", "completion", "label")
SIDES = ("chosen", "rejected")
_KNOWN_COLUMNS = ("prompt", "chosen", "rejected", "completion", "label", "tools", "chat_template_kwargs")
READ_COLUMNS = (*_KNOWN_COLUMNS, *QUESTION_COLUMNS, *IMAGE_COLUMNS)
READ_ROWS = 256

# Text, or a list of messages.
Content = str | list[dict[str, Any]]


@dataclass(frozen=True)
class TokenIds:
    """Holds a row's token ids as training sees them: of the prompt, and of each completion by column.

    `prompt_alone` is the prompt's token count before what does not survive the completion's tokens is left out;
    `changed_tail` the end of the prompt that the chat template renders only if no completion follows; `failure` why
    there are no ids.
    """

    prompt: list[int] = field(default_factory=list)
    completions: dict[str, list[int]] = field(default_factory=dict)
    prompt_alone: int = 0
    changed_tail: str | None = None
    failure: str | None = None


@dataclass
class Record:
    """Holds one row: a prompt and its completions (`chosen` and `rejected`, or one `completion` with a label).

    The prompt is split off the completions as in training where the row has none of its own (`implicit_prompt`).
    """

    row: int
    prompt: Content
    completions: dict[str, Content]
    label: bool | None = None
    implicit_prompt: bool = False
    template_options: dict[str, Any] = field(default_factory=dict)
    tokens: TokenIds | None = None
    images: RecordImages = field(default_factory=RecordImages)

    @property
    def paired(self) -> bool:
        """Says whether the row is a pair."""
        return self.label is None

    @property
    def conversational(self) -> bool:
        """Says whether the row consists of messages."""
        return isinstance(self.prompt, list)

    @property
    def messages(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the messages of the prompt and of each completion, by column; nothing where the row is text."""
        columns = {"prompt": self.prompt, **self.completions}
        return {column: value for column, value in columns.items() if isinstance(value, list)}

    @cached_property
    def texts(self) -> dict[str, str]:
        """Returns the bare text of the prompt and of each completion, by column."""
        return {column: plain_text(value) for column, value in {"prompt": self.prompt, **self.completions}.items()}

    @cached_property
    def characters(self) -> dict[str, Counter[str]]:
        """Counts how often each character occurs, by column."""
        return {column: Counter(text) for column, text in self.texts.items()}

    @property
    def shared_start(self) -> str:
        """Returns the last line of an implicit text prompt: it may well belong to the responses.

        Splitting at the first difference leaves words in the prompt that both responses happen to begin with.
        """
        if not self.implicit_prompt or not isinstance(self.prompt, str):
            return ""
        return self.prompt[self.prompt.rfind("\n") + 1 :]

    def response(self, column: str) -> str:
        """Returns a completion's text, with the beginning it shares with the other if the prompt is implicit."""
        return self.shared_start + self.texts[column]

    def keys(self) -> tuple[int, int, int]:
        """Returns 64-bit hashes of the prompt, of prompt + preferred response, and of prompt + the other one.

        Equal texts but for runs of white space and Unicode composition have equal hashes. 0 stands for "none": an
        empty prompt, and the side that an unpaired row does not have.
        """
        prompt = _canonical(self.prompt)
        if isinstance(self.prompt, str):
            prompt = normalise(self.prompt[: len(self.prompt) - len(self.shared_start)])
        prompt = "\x1c".join([prompt, *self.images.digests])
        sides = {
            column: _hash(f"{prompt}\x1d{_canonical(self.response(column) if isinstance(value, str) else value)}")
            for column, value in self.completions.items()
        }
        chosen, rejected = (sides.get(column, 0) for column in SIDES)
        if not self.paired:
            chosen, rejected = (sides["completion"], 0) if self.label else (0, sides["completion"])
        return _hash(prompt) if prompt else 0, chosen, rejected


@dataclass(frozen=True)
class Context:
    """Holds what checks may use: a tokenizer, without which records have no token ids, a limit, a reader of images."""

    tokenizer: "PreTrainedTokenizerBase | None" = None
    max_length: int | None = None
    image_reader: "ImageReader | None" = None

    @cached_property
    def special_tokens(self) -> re.Pattern[str] | None:
        """Finds the tokenizer's special tokens in text, the longest first; None if there are none."""
        if self.tokenizer is None:
            return None
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*added, *self.tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None


def message_text(message: dict[str, Any]) -> str:
    """Returns the text of a message; of content in parts, that of the text parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def plain_text(value: Content) -> str:
    """Returns a text, or the texts of messages with line breaks between them."""
    return value if isinstance(value, str) else "\n".join(message_text(message) for message in value)


def normalise(text: str) -> str:
    """Composes characters (NFC), and leaves one space for each run of white space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _canonical(value: Content) -> str:
    """Returns the text that identifies a text or a list of messages, by its roles, texts and tool calls."""
    if isinstance(value, str):
        return normalise(value)
    parts = []
    for message in value:
        calls = message.get("tool_calls")
        extra = json.dumps(calls, sort_keys=True, default=str) if calls else ""
        parts.append(f"{message['role']}\x1f{normalise(message_text(message))}\x1f{extra}")
    return "\x1e".join(parts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


def check_columns(dataset: AnyDataset, name: str) -> list[str]:
    """Returns the columns of a dataset that are read.

    Raises ValueError if it has no rows, or neither `chosen` and `rejected` nor `prompt`, `completion` and `label`, or
    only token ids.
    """
    columns = list(next(iter(dataset), {}))
    if not set(LABELLED_COLUMNS) <= set(columns) or {"chosen", "rejected"} <= set(columns):
        columns = check_preference_columns(dataset, name, reads_images=True)
        if not {"chosen", "rejected"} <= set(columns):
            raise ValueError(f"The {name} dataset has only token ids; expected the text that they were made of.")
    return [column for column in READ_COLUMNS if column in columns]


def read_slices(dataset: AnyDataset, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows as dicts of these columns, READ_ROWS at a time."""
    for batch in dataset.select_columns(columns).iter(batch_size=READ_ROWS):
        rows = zip(*(batch[column] for column in columns), strict=True)
        yield [dict(zip(columns, values, strict=True)) for values in rows]


def make_record(example: dict[str, Any], row: int, name: str) -> Record:
    """Returns the record of a row.

    Raises ValueError if the row's columns are not all text or all messages, or if its label is not true or false.
    """
    options = template_options(example)
    if "chosen" not in example:
        _check_unpaired_row(example, row, name)
        completions = {"completion": example["completion"]}
        images = read_images(example, {"prompt": example["prompt"], **completions})
        label = bool(example["label"])
        return Record(row, example["prompt"], completions, label, template_options=options, images=images)
    filled = _fill_empty_completions(example)
    check_preference_row(filled, row, name, reads_images=True)
    split = maybe_extract_prompt(filled)
    completions = {column: split[column] if example[column] else example[column] for column in SIDES}
    images = read_images(example, {"prompt": split["prompt"], **completions})
    implicit = split is not filled
    return Record(row, split["prompt"], completions, None, implicit, options, images=images)


def _fill_empty_completions(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with its empty completions filled: they are a finding, not a row that cannot be read."""
    filled = dict(example)
    for column in SIDES:
        if example[column] in ("", []):
            filled[column] = "-" if example[column] == "" else [{"role": "assistant", "content": "-"}]
        elif isinstance(example[column], list):
            filled[column] = [_with_content(message) for message in example[column]]
    return filled


def _with_content(message: Any) -> Any:
    empty = isinstance(message, dict) and message.get("content") is None and not message.get("tool_calls")
    return {**message, "content": ""} if empty else message


def _check_unpaired_row(example: dict[str, Any], row: int, name: str) -> None:
    place = f"The {name} dataset, row {row}"
    if example["label"] not in (True, False):
        raise ValueError(f"{place}, column 'label': {example['label']!r}; expected true or false.")
    kinds = []
    for column in ("prompt", "completion"):
        value = example[column]
        if not (isinstance(value, str) or value == [] or is_conversational({column: value})):
            raise ValueError(
                f"{place}, column {column!r}: {quote(value)} is of type {type(value).__name__}; expected a "
                "string, or a list of messages such as {'role': 'assistant', 'content': 'Hello.'}."
            )
        check_content(value, column, row, name, reads_images=True)
        kinds.append(isinstance(value, str))
    if kinds[0] != kinds[1]:
        raise ValueError(f"{place}: one of 'prompt' and 'completion' is text, the other messages; expected one kind.")
