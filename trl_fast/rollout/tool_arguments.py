"""Holds the arguments of a tool call against the tool's signature and JSON schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from numbers import Real
from typing import Any

from trl_fast.settings.ranges import INTEGER

from .reward_answers import shown

# The types of JSON schema, as JSON's values are in Python. A truth value is no number, and 3.0 is an integer.
_IS_OF_TYPE: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: isinstance(value, Real) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and value in INTEGER,
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}


def checked_arguments(tool: Callable[..., Any], schema: dict[str, Any], arguments: Any) -> Any:
    """Returns the arguments of a call if they are of the types that the tool takes.

    Missing and unknown arguments are left to Python, whose error names them, as in TRL.

    Args:
        tool: the function.
        schema: its description, of transformers' `get_json_schema`.
        arguments: what a model wrote: an object, or the JSON text of one.

    Raises:
        ValueError: one is of another type, or the text is no JSON; one line for the model, which names the argument
            and what the tool takes.
    """
    name, properties = schema["function"]["name"], schema["function"]["parameters"].get("properties", {})
    takes = ", ".join(f"{each}: {_described(kind)}" for each, kind in properties.items()) or "no arguments"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"{name}: the arguments are no JSON ({error}); it takes {takes}") from error
    defaults = {each.name: each.default for each in inspect.signature(tool).parameters.values()}
    for argument, value in arguments.items() if isinstance(arguments, dict) else ():
        # A default of None need not be in the type.
        unset = value is None and defaults.get(argument, inspect.Parameter.empty) is None
        if not unset and (problem := _mismatch(value, properties.get(argument, {}))):
            raise ValueError(f"{name}: argument {argument!r}{problem}; it takes {takes}")
    return arguments


def _mismatch(value: Any, schema: dict[str, Any], place: str = "") -> str:
    """Returns where a value is not what its schema says, and what was expected there; an empty text if it fits."""
    if value is None and schema.get("nullable"):
        return ""
    if "anyOf" in schema:
        fits = any(not _mismatch(value, each) for each in schema["anyOf"])
        return "" if fits else f"{place}: expected {_described(schema)}, got {shown(value)}"
    named = schema.get("type", [])
    types = [named] if isinstance(named, str) else named
    if types and not any(_IS_OF_TYPE[each](value) for each in types if each in _IS_OF_TYPE):
        return f"{place}: expected {_described(schema)}, got {shown(value)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{place}: expected one of {shown(schema['enum'])}, got {shown(value)}"
    return next(filter(None, _mismatches_within(value, schema, place)), "")


def _mismatches_within(value: Any, schema: dict[str, Any], place: str) -> list[str]:
    """Returns what `_mismatch` says of each element of a list, or value of an object."""
    if isinstance(value, list | tuple):
        kinds = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        if len(kinds) != len(value):
            return [f"{place}: expected {len(kinds)} elements, got {shown(value)}"]
        return [
            _mismatch(each, kind, f"{place}[{i}]") for i, (each, kind) in enumerate(zip(value, kinds, strict=True))
        ]
    if isinstance(value, dict):
        kinds, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        other = other if isinstance(other, dict) else {}
        return [_mismatch(each, kinds.get(key, other), f"{place}[{key!r}]") for key, each in value.items()]
    return []


def _described(schema: dict[str, Any]) -> str:
    """Returns the type that a schema asks for, such as "integer" or "array of string"."""
    if "anyOf" in schema:
        text = " or ".join(map(_described, schema["anyOf"]))
    else:
        named = schema.get("type", "anything")
        text = named if isinstance(named, str) else " or ".join(named)
    if "items" in schema:
        text += f" of {_described(schema['items'])}"
    if "enum" in schema:
        text += f" {shown(schema['enum'])}"
    return f"{text} or null" if schema.get("nullable") else text
