"""What can be wrong with data for supervised fine-tuning, found before training starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from .checks import SCAN_ROWS, place
from .dataset_types import AnyDataset


def check_first_row(dataset: AnyDataset, text_field: str, formatted: bool, name: str = "train") -> list[str]:
    """The dataset's column names, if its first row holds something to learn; `formatted` rows may hold anything.

    Raises ValueError if it has no row, reads its rows through a transform, has images, or none of the known columns.
    """
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise ValueError(
            f"The {name} dataset reads its rows through with_transform(), of which one reading would be kept for all "
            "epochs. Set dataset_kwargs={'skip_prepare_dataset': True} and let the transform return input_ids "
            "and labels, or use dataset.map()."
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} dataset has no rows; expected at least one.")
    columns = list(row)
    images = [column for column in ("image", "images") if column in columns]
    if images:
        raise ValueError(
            f"The {name} dataset has the column {images[0]!r}: vision data is not supported yet. Remove the column to "
            "train on the text alone."
        )
    known = ({"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {text_field})
    if formatted or any(kind <= set(columns) for kind in known):
        return columns
    hint = (
        "preference pairs, which DPOTrainer and RewardTrainer take" if {"chosen", "rejected"} <= set(columns) else ""
    )
    raise ValueError(
        f"The {name} dataset has the columns {columns}{f' ({hint})' if hint else ''}; expected {text_field!r} (the "
        "column of text, see dataset_text_field), 'messages', 'conversations', 'prompt' and 'completion', or "
        "'input_ids'. Rename yours with dataset.rename_column(...), or give a formatting_func."
    )


def check_row(example: dict[str, Any], text_field: str, row: int, name: str = "train") -> dict[str, Any]:
    """The columns of a row that count: those of one kind of data, and what its chat template takes.

    Raises ValueError unless text is a string and messages are a list of dicts with a role, in all columns alike.
    """
    if example.keys() >= {"prompt", "completion"}:
        columns = ["prompt", "completion"]
    else:
        columns = [next(name for name in ("messages", "conversations", text_field) if name in example)]
    kinds = {column: _kind(example[column], column == text_field) for column in columns}
    for column, kind in kinds.items():
        if kind is None:
            shown = repr(example[column])
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            expected = "a string" if column == text_field else "messages such as {'role': 'user', 'content': 'Hi.'}"
            if column in ("prompt", "completion"):
                expected = f"a string, or {expected}"
            raise ValueError(
                f"{place(name, row)}, column {column!r}: {shown} is of type {type(example[column]).__name__}; "
                f"expected {expected}."
            )
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{place(name, row)}: 'prompt' is {kinds['prompt']}, 'completion' is {kinds['completion']}; "
            "expected both to be text, or both messages."
        )
    taken = [*columns, "tools", "chat_template_kwargs"]
    return {column: example[column] for column in taken if column in example}


def _kind(value: Any, text_only: bool) -> str | None:
    if isinstance(value, str):
        return "text"
    named = ({"role"}, {"from", "value"})
    if text_only or not isinstance(value, list) or not value:
        return None
    known = all(isinstance(message, dict) and any(keys <= message.keys() for keys in named) for message in value)
    return "messages" if known else None


def row_lengths(dataset: Dataset, name: str = "train") -> np.ndarray:
    """The number of tokens of each row (R,) int64.

    Raises ValueError if a row has more or fewer labels than tokens.
    """
    lengths = [np.empty(0, dtype=np.int64)]
    tables = dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=SCAN_ROWS)
    for index, table in enumerate(tables):
        ids, labels = (
            pc.fill_null(pc.list_value_length(table[column].combine_chunks()), 0).to_numpy(zero_copy_only=False)
            for column in ("input_ids", "labels")
        )
        wrong = np.flatnonzero(ids != labels)
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{place(name, index * SCAN_ROWS + row)}: 'labels' has {labels[row]} elements, 'input_ids' "
                f"{ids[row]}; expected as many."
            )
        lengths.append(ids.astype(np.int64))
    return np.concatenate(lengths)
