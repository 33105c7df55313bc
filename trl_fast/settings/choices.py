"""Checks settings that take one of several names, and suggests the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from enum import Enum
from functools import cache, cached_property
from typing import Any, get_args, get_type_hints

from trl_fast.lazy_imports import import_place

# Choices that configs share with trl_fast.data: the end of a row longer than max_length that stays, and how rows are
# packed.
TRUNCATION_MODES = ("keep_start", "keep_end")
PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")
# Whether the assistant's turns are learned in one sequence, or each in a sequence of its own.
TOGETHER, SEPARATELY = ASSISTANT_TURNS = ("together", "separately")
# How widely rows are dealt by their cost, the narrowest first: see `trainers.base.balancing`.
BALANCES = ("never", "micro_batch", "step")


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


def one_of(choices: Sequence[str] | str, *, default: str | None) -> Any:
    """Makes a field of a dataclass that takes one of several names.

    Args:
        choices: the names, or the place "module:name" of a table of them, which is imported when it is needed.
        default: the field's default.
    """
    return field(default=default, metadata={"choices": Choices(choices) if isinstance(choices, str) else choices})


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
        hint = did_you_mean(str(value), map(str, choices))
        raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(map(str, choices))}{hint}")


def check_choices(settings: Any, owner: type) -> None:
    """Checks the fields of a dataclass that take one of several names.

    These are the fields of `owner`, its class or one above it, with `choices` in their metadata, and those that are
    annotated with an enum. None is taken where it is the default.

    Raises:
        ValueError: a field has another value; the message lists the choices, and the nearest one.
    """
    enums = _enum_names(owner)
    for item in fields(owner):
        choices, value = enums.get(item.name) or item.metadata.get("choices"), getattr(settings, item.name)
        if choices and not isinstance(value, Enum) and not (value is None and item.default is None):
            check_choice(settings, item.name, choices)


@cache
def _enum_names(owner: type) -> dict[str, tuple[str, ...]]:
    """Returns the names that each field annotated with an enum takes, but for lists of them."""
    found = {}
    for name, hint in get_type_hints(owner).items():
        for part in get_args(hint) or (hint,):
            if isinstance(part, type) and issubclass(part, Enum):
                found[name] = tuple(str(member.value) for member in part)
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'beta'?` for the known name nearest to `name`; an empty text if none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
