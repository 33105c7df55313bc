"""Checks settings that are truth values, texts or maps: what they are given is of that type."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from .ranges import annotation

# What an annotation may say besides the one type.
_OPTIONAL = {"None", "NoneType", "Optional", "typing", "class"}


def check_types(settings: Any) -> None:
    """Checks the fields of a dataclass that are a truth value or a text, with or without None.

    A truth value may be written as 0 or 1, and becomes one. A number or truth value for a text becomes a text.

    Raises:
        ValueError: one line with the field, the value and a remedy.
    """
    for item in fields(settings):
        text, value = annotation(type(settings), item), getattr(settings, item.name)
        words = set(re.findall(r"\w+", text)) - _OPTIONAL
        if words == {"bool"}:
            _set(settings, item.name, _truth_value(item.name, value, optional="None" in text or item.default is None))
        elif words == {"str"}:
            _set(settings, item.name, _text(item.name, value))


def _set(settings: Any, name: str, value: Any) -> None:
    if value is not getattr(settings, name):
        object.__setattr__(settings, name, value)


def _truth_value(name: str, value: Any, *, optional: bool) -> bool | None:
    if isinstance(value, bool) or (value is None and optional):
        return value
    if type(value).__module__ in ("builtins", "numpy") and not isinstance(value, str) and value in (0, 1):
        return bool(value)
    advice = "a text counts as True, whatever it says" if isinstance(value, str) else "give one of them"
    raise ValueError(f"{name}: expected True or False, got {value!r}; {advice}")


def _text(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, os.PathLike)):
        return value
    if isinstance(value, (bool, int, float)):
        return str(value)
    raise ValueError(f"{name}: expected one text, got {value!r}; give a single value")


def check_maps(settings: Any, names: Iterable[str]) -> None:
    """Checks the fields that are maps from names to values, or such a map as JSON text, or a file that holds one.

    Raises:
        ValueError: one line with the field, the value and a remedy.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str):
            _check_json(name, value)
        elif isinstance(value, (list, tuple, set, bool, int, float)):
            raise ValueError(f'{name}: expected a map such as {{"name": "value"}}, got {value!r}; write one')


def _check_json(name: str, text: str) -> None:
    if not text.startswith("{"):
        if os.path.isfile(text):
            _check_json_file(name, text)
            return
        raise ValueError(f'{name}: expected a map in JSON such as {{"name": 1}}, got {text!r}; write one')
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: no valid JSON at column {error.colno} of {text!r}: {error.msg}; texts need double quotes"
        ) from error


def _check_json_file(name: str, file: str) -> None:
    try:
        with open(file, encoding="utf-8") as stream:
            json.load(stream)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: {file}, line {error.lineno}: no valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {file} cannot be read: {error}") from error
