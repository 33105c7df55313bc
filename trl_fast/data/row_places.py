"""Writes the parts that messages about rows share: the place, the value, and what to do."""

from __future__ import annotations

from typing import Any


def place(name: str, row: int) -> str:
    """Names the dataset and row that something is wrong with, for the start of a message."""
    return f"The {name} dataset, row {row}"


def remove_rows(column: str) -> str:
    """Tells what to do about an empty completion, for the end of a message."""
    return f"Fill it, or remove such rows with dataset.filter(lambda row: len(row[{column!r}]) > 0)."


def shorten(value: Any) -> str:
    """Returns a value as a message shows it, in one line of at most 80 characters."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= 80 else text[:77] + "..."
