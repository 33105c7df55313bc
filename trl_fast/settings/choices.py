"""Checks settings that take one of several names, and suggests the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from trl_fast.lazy_imports import import_place

# Choices that configs share with trl_fast.data: the end of a row longer than max_length that stays, and how rows are
# packed.
TRUNCATION_MODES = ("keep_start", "keep_end")
PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")


class Choices(Sequence[str]):
    """Holds the names that a field takes: those of a table elsewhere, which is imported when they are first needed.

    A config can thus name the choices of a loss or an op, and be imported without them.

    Args:
        place: the table's place, "module:name"; names in order, or a mapping from them.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(import_place(self.place))

    def __getitem__(self, index: Any) -> Any:
        return self._names[index]

    def __len__(self) -> int:
        return len(self._names)


def check_choice(settings: Any, name: str, choices: Sequence[str] | None = None) -> None:
    """Checks that a field of a dataclass has one of the values that it may have.

    Args:
        settings: the dataclass.
        name: the field.
        choices: the values; None: the `choices` in the field's metadata.

    Raises:
        ValueError: it has another; the message lists the choices.
    """
    if choices is None:
        (choices,) = (item.metadata["choices"] for item in fields(settings) if item.name == name)
    value = getattr(settings, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(choices)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'beta'?` for the known name nearest to `name`; an empty text if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
