"""Checks the columns and rows of datasets before training starts.

Every error names the dataset and row, the column or field, the value, and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from .conversation_checks import check_content
from .dataset_types import AnyDataset
from .question_columns import check_no_question_is_left_out, rename_hint, warn_of_system_column
from .row_places import place, remove_rows, shorten

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
UNPAIRED_TOKEN_COLUMNS = ("prompt_ids", "completion_ids")
LABEL = "label"


def read_columns(dataset: AnyDataset, expected: str, name: str = "train", *, reads_images: bool = False) -> list[str]:
    """Returns the column names of a dataset; a stream's are those of its first row.

    expected: says in the error what a dataset without rows should have. reads_images: whether there is a processor for
    images.

    Raises ValueError if the dataset has no row, has a column of images that nothing reads, or both columns of images.
    """
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset has no rows; expected {expected}.")
    columns = list(first_row)
    images = [column for column in ("image", "images") if column in columns]
    if len(images) == 2:
        raise ValueError(f"The {name} dataset has the columns 'image' and 'images'; remove one of them.")
    if images and not reads_images:
        raise ValueError(
            f"The {name} dataset has the column {images[0]!r}, but nothing reads images: give a model that does, with "
            "its processor as processing_class and a dataset with images (train_dataset or eval_dataset), or remove "
            "the column to read the text alone."
        )
    return columns


def check_preference_columns(
    dataset: AnyDataset,
    name: str = "train",
    token_columns: tuple[str, ...] = TOKEN_COLUMNS,
    *,
    others: tuple[str, ...] = (),
    reads_images: bool = False,
) -> list[str]:
    """Returns the column names of a preference dataset; a stream's are those of its first row.

    others: further columns of completions. reads_images: whether there is a processor for images.

    Raises ValueError if the dataset is empty, has images that nothing reads, or has neither `chosen`, `rejected` and
    the others nor all the token columns.
    """
    columns = read_columns(dataset, "at least one preference pair", name, reads_images=reads_images)
    warn_of_system_column(dataset, columns, name)
    if not ({"chosen", "rejected", *others} <= set(columns) or set(token_columns) <= set(columns)):
        *first, last = (repr(column) for column in ("chosen", "rejected", *others))
        raise ValueError(
            f"The {name} dataset has the columns {columns}; expected {', '.join(first)} and {last} (with or without "
            f"'prompt'), or the tokenized {', '.join(token_columns)}. Rename yours: in the file, or with "
            "dataset.rename_column(...)."
        )
    return columns


def check_unpaired_columns(dataset: AnyDataset, name: str = "train", *, reads_images: bool = False) -> list[str]:
    """Returns the column names of a dataset of labelled completions, or of preference pairs that become such.

    reads_images: whether there is a processor for images.

    Raises ValueError if the dataset is empty, has images that nothing reads, or lacks one of `prompt`, `completion`
    and `label`, without having their token columns or `chosen` and `rejected` instead. Pairs with images are refused,
    as by TRL: each image would stand twice in the dataset's cache.
    """
    columns = read_columns(dataset, "at least one completion with a label", name, reads_images=reads_images)
    warn_of_system_column(dataset, columns, name)
    known = set(columns)
    if reads_images and {"chosen", "rejected"} & known:
        raise ValueError(
            f"The {name} dataset has images and pairs; with images, expected 'prompt', 'completion' and 'label'. "
            "Unpair it first: dataset = unpair_preference_dataset(dataset)."
        )
    if {"chosen", "rejected"} <= known or known >= {*UNPAIRED_TOKEN_COLUMNS, LABEL}:
        return columns
    missing = [column for column in ("prompt", "completion", LABEL) if column not in known]
    if missing:
        raise ValueError(
            f"The {name} dataset has the columns {columns}, but no {missing[0]!r}; expected 'prompt', 'completion' "
            "and 'label' (True for good completions, False for bad ones), or the tokenized prompt_ids, "
            f"completion_ids and label, or preference pairs of 'chosen' and 'rejected'. {rename_hint(columns)}"
        )
    return columns


def check_sft_columns(
    dataset: AnyDataset, text_field: str, formatted: bool, name: str = "train", *, reads_images: bool = False
) -> list[str]:
    """Returns the dataset's column names, if its first row holds something to learn.

    formatted: a `formatting_func` writes the text, so rows may hold anything. reads_images: whether there is a
    processor for images.

    Raises ValueError if the dataset has no row, reads its rows through a transform, has images that nothing reads, or
    none of the known columns.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset reads its rows through with_transform(), of which one reading would be kept for all "
            "epochs. Set dataset_kwargs={'skip_prepare_dataset': True} and let the transform return input_ids "
            "and labels, or use dataset.map()."
        )
    columns = read_columns(dataset, "at least one", name, reads_images=reads_images)
    if not formatted:
        warn_of_system_column(dataset, columns, name)
    known = ({"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {text_field})
    if formatted or any(kind <= set(columns) for kind in known):
        return columns
    hint = (
        "preference pairs, which DPOTrainer and RewardTrainer take" if {"chosen", "rejected"} <= set(columns) else ""
    )
    raise ValueError(
        f"The {name} dataset has the columns {columns}{f' ({hint})' if hint else ''}; expected {text_field!r} (the "
        "column of text, see dataset_text_field), 'messages', 'conversations', 'prompt' and 'completion', or "
        f"'input_ids'. {rename_hint(columns)} Or give a formatting_func."
    )


def check_preference_row(
    example: dict[str, Any],
    row: int,
    name: str = "train",
    *,
    others: tuple[str, ...] = (),
    one_may_be_empty: bool = False,
    reads_images: bool = False,
) -> None:
    """Checks that `chosen`, `rejected` and `prompt` (if any) are all text or all lists of messages.

    others: columns of further completions, of which the same is expected.

    A `prompt` of the other kind than the completions is let through where they are messages: it is then ignored, and
    the prompt taken from the messages that `chosen` and `rejected` share. Empty completions are refused; with
    `one_may_be_empty` only where both are. Without a `prompt`, a question in another column has to be in both.
    reads_images: whether messages may have images.

    Raises ValueError otherwise.
    """
    completions = ("chosen", "rejected", *others)
    empty = [column for column in completions if example.get(column) in ("", [])]
    if empty and not (one_may_be_empty and len(empty) == 1):
        raise ValueError(f"{place(name, row)}, column {empty[0]!r}: the completion is empty. {remove_rows(empty[0])}")
    columns = [column for column in (*completions, "prompt") if column != "prompt" or column in example]
    kinds = {column: _known_kind(example.get(column), column, row, name, reads_images) for column in columns}
    different = len({kinds[column] for column in completions}) > 1
    if different or (kinds["chosen"] == "text" and kinds.get("prompt", "text") != "text"):
        found = ", ".join(f"{column!r} is {kind}" for column, kind in kinds.items())
        raise ValueError(f"{place(name, row)}: {found}; expected all of them to be text, or all messages.")
    check_no_question_is_left_out(example, row, name)


def check_unpaired_row(example: dict[str, Any], row: int, name: str = "train", *, reads_images: bool = False) -> None:
    """Checks that `label` is a truth value, and that `prompt` and `completion` are both text or both messages.

    reads_images: whether messages may have images.

    Raises ValueError otherwise, also for an empty completion and for a prompt without messages.
    """
    check_label(example[LABEL], row, name)
    check_prompt_and_completion(example, row, name, reads_images=reads_images)


def check_prompt_and_completion(
    example: dict[str, Any], row: int, name: str = "train", *, reads_images: bool = False
) -> None:
    """Checks that `prompt` and `completion` are both text or both messages, and that there is a completion.

    reads_images: whether messages may have images.

    Raises ValueError otherwise.
    """
    columns = ("prompt", "completion")
    kinds = {column: _known_kind(example[column], column, row, name, reads_images) for column in columns}
    if not example["completion"]:
        raise ValueError(
            f"{place(name, row)}, column 'completion': the completion is empty. {remove_rows('completion')}"
        )
    if example["prompt"] == []:
        raise ValueError(f"{place(name, row)}, column 'prompt': there are no messages. Fill it, or remove the row.")
    _check_same_kind(kinds, row, name)


def check_label(label: Any, row: int, name: str = "train") -> None:
    """Checks that a label is a bool, 0 or 1.

    Raises ValueError otherwise.
    """
    if not (isinstance(label, (bool, int, float)) and label in (0, 1)):
        raise ValueError(
            f"{place(name, row)}, column 'label': {shorten(label)} is no truth value; expected True for a good "
            "completion, False for a bad one."
        )


def check_margin(margin: Any, row: int, name: str = "train") -> None:
    """Checks that the margin of a preference pair is a finite number.

    Raises ValueError otherwise.
    """
    if not (isinstance(margin, (int, float)) and math.isfinite(margin)):
        raise ValueError(
            f"{place(name, row)}, column 'margin': expected a finite number, got {margin!r}. Fill it in "
            "all rows, or remove the column."
        )


def check_sft_row(
    example: dict[str, Any], text_field: str, row: int, name: str = "train", *, reads_images: bool = False
) -> dict[str, Any]:
    """Returns the columns of a row that count: those of one kind of data, and what its chat template takes.

    reads_images: whether messages may have images.

    Raises ValueError unless text is a string and messages are a list of dicts with a role, in all columns alike.
    """
    if example.keys() >= {"prompt", "completion"}:
        columns = ["prompt", "completion"]
    else:
        columns = [next(name for name in ("messages", "conversations", text_field) if name in example)]
    kinds = {column: _sft_kind(example[column], column, text_field) for column in columns}
    for column, kind in kinds.items():
        if kind is None:
            if isinstance(example[column], str):
                check_content(example[column], column, row, name)
            expected = "a string" if column == text_field else "messages such as {'role': 'user', 'content': 'Hi.'}"
            if column in ("prompt", "completion"):
                expected = f"a string, or {expected}"
            raise ValueError(
                f"{place(name, row)}, column {column!r}: {shorten(example[column])} is of type "
                f"{type(example[column]).__name__}; expected {expected}."
            )
        check_content(example[column], column, row, name, reads_images=reads_images)
    _check_same_kind(kinds, row, name)
    taken = [*columns, "tools", "chat_template_kwargs"]
    return {column: example[column] for column in taken if column in example}


def check_prompt(prompt: Any, row: int, name: str = "train", *, reads_images: bool = False) -> None:
    """Checks that a prompt is a text, or a list of messages with something in it.

    reads_images: whether messages may have images.

    Raises ValueError otherwise.
    """
    if prompt == []:
        raise ValueError(f"{place(name, row)}, column 'prompt': there are no messages. Fill it, or remove the row.")
    _known_kind(prompt, "prompt", row, name, reads_images)


def _known_kind(value: Any, column: str, row: int, name: str, reads_images: bool) -> str:
    """Returns "text" or "messages".

    Raises ValueError for anything else.
    """
    kind = kind_of(value)
    if kind is None:
        raise ValueError(
            f"{place(name, row)}, column {column!r}: {shorten(value)} is of type {type(value).__name__}; "
            "expected a string, or a list of messages such as {'role': 'assistant', 'content': 'Hello.'}."
        )
    check_content(value, column, row, name, reads_images=reads_images)
    return kind


def _check_same_kind(kinds: Mapping[str, str | None], row: int, name: str) -> None:
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{place(name, row)}: 'prompt' is {kinds['prompt']}, 'completion' is {kinds['completion']}; expected both "
            "to be text, or both messages."
        )


def kind_of(value: Any) -> str | None:
    """Returns "text" for a string, "messages" for a list of dicts with a role, None for anything else."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value):
        return "messages"
    return None


def _sft_kind(value: Any, column: str, text_field: str) -> str | None:
    if isinstance(value, str):
        return None if column in ("messages", "conversations") and column != text_field else "text"
    named = ({"role"}, {"from", "value"})
    if column == text_field or not isinstance(value, list) or not value:
        return None
    known = all(isinstance(message, dict) and any(keys <= message.keys() for keys in named) for message in value)
    return "messages" if known else None
