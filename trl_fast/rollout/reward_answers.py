"""Checks what reward functions return, and copies what they are given, so that they change nothing but their own."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch

_SHOWN_CHARACTERS = 200
_REMEDY = "return a list with one number a completion, None where there is no reward"


def copied(value: Any) -> Any:
    """Returns a value whose lists, dicts, arrays and tensors are copies; what cannot change in place is the same."""
    if type(value) is list:
        # Token ids and texts, by far the most of it, need no look at each.
        if value and type(value[0]) in (int, str) and not any(map(_is_mutable, set(map(type, value)))):
            return value.copy()
        return [copied(each) for each in value]
    if type(value) is dict:
        return {name: copied(each) for name, each in value.items()}
    if type(value) is tuple:
        return tuple(copied(each) for each in value)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value


def _is_mutable(kind: type) -> bool:
    return issubclass(kind, list | dict | tuple | np.ndarray | torch.Tensor)


def listed(answer: Any, count: int) -> Any:
    """Returns a function's answer with its values at hand, at most a hundred times too many; what is no list as is."""
    if isinstance(answer, torch.Tensor):
        return answer.tolist()
    # An awaitable is not the answer yet.
    if isinstance(answer, list | tuple) or not _is_listable(answer) or inspect.isawaitable(answer):
        return answer
    return list(islice(answer, 100 * (count + 1)))


def _is_listable(answer: Any) -> bool:
    """Says whether an answer can be one of several values in order."""
    ordered = isinstance(answer, Iterable) and not isinstance(answer, str | bytes | bytearray | Mapping | Set)
    return ordered and getattr(answer, "shape", None) != ()


def checked_rewards(name: str, answer: Any, prompts: list) -> list[float]:
    """Returns a reward function's answer as floats, NaN for None.

    Args:
        name: the function's.
        answer: what it returned.
        prompts: those of the completions, for the message.

    Raises:
        ValueError: the answer is something else than a finite number or None for each completion; one line that names
            the function, and the completion with its prompt's beginning.
    """
    who = f"reward function {name!r}"
    if inspect.iscoroutine(answer):
        answer.close()
    if not _is_listable(answer):
        raise ValueError(f"{who} returned {shown(answer)} of type {type(answer).__name__}; {_REMEDY}")
    values = list(answer)
    if len(values) != len(prompts):
        raise ValueError(f"{who} returned {len(values)} rewards for {len(prompts)} completions; {_REMEDY}")
    return [_as_float(value, f"{who}, completion {i}", prompts[i]) for i, value in enumerate(values)]


def checked_reward(value: Any) -> Any:
    """Returns what an environment told as its reward.

    Raises:
        ValueError: it is neither a finite number nor None.
    """
    try:
        _as_float(value, "get_reward()", None)
    except ValueError as error:
        raise ValueError(
            f"get_reward() returned {shown(value)} of type {type(value).__name__}; expected a finite number, or None "
            "for no reward"
        ) from error
    return value


def _as_float(value: Any, where: str, prompt: Any) -> float:
    if value is None:
        return math.nan
    try:
        # Scalars of torch and numpy.
        number: Any = value.item() if getattr(value, "shape", None) == () else value
        magnitude: Any = abs(number) if isinstance(number, Real) else math.inf
        finite = bool(magnitude <= torch.finfo(torch.float32).max)
        reward = float(number) if finite else math.nan
    except Exception as error:
        raise ValueError(f"{where}: {shown(value)} cannot be read as a number ({error}); {_REMEDY}") from error
    if not isinstance(number, Real):
        raise ValueError(
            f"{where}: expected a number or None, got {shown(value)} of type {type(value).__name__} (prompt: "
            f"{shown(prompt)}); {_REMEDY}"
        )
    if not finite:
        raise ValueError(
            f"{where}: expected a finite number, or None for no reward, got {shown(number)} (prompt: "
            f"{shown(prompt)}); {_REMEDY}"
        )
    return reward


def shown(value: Any) -> str:
    """Returns a value on one line, cut where it is long."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
