"""Tells what a user's subclass of a trainer overrides, and refuses the methods of TRL's that nothing here calls."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

_LIBRARIES = ("trl_fast", "transformers", "builtins")
_DECORATORS = ("torch", "contextlib", "functools")


def users_method(trainer_class: type, name: str) -> Any:
    """Returns what a user's class defines under a name that ours, or TRL's, use; None where it is not the user's.

    trainer_class: a trainer of ours, or a subclass of one. A mix-in counts as the user's too, where Python finds the
    name in it first, and so does a function that was put into one of our classes.
    """
    owner = next((owner for owner in trainer_class.__mro__ if name in vars(owner)), None)
    if owner is None or (_is_of_a_library(owner) and not _is_put_in(vars(owner)[name])):
        return None
    return vars(owner)[name]


def overridden(trainer_class: type, *names: str) -> tuple[str, ...]:
    """Returns those of the names that a user's class defines."""
    return tuple(name for name in names if users_method(trainer_class, name) is not None)


def uncalled_hooks(trainer_class: type) -> dict[str, str]:
    """Returns the methods of TRL's trainer that ours never calls, and what to do instead of overriding them.

    Each trainer class lists its own in `uncalled_hooks`, private ones and those of older releases included.
    """
    found: dict[str, str] = {}
    for owner in reversed(trainer_class.__mro__):
        found |= vars(owner).get("uncalled_hooks", {})
    return found


def check_overrides(trainer_class: type, attributes: Collection[str] = ()) -> None:
    """Checks that a subclass defines no method of TRL's trainer that would never be called.

    A method that the subclass itself calls, from another method of its own, is left alone. attributes: names that were
    put into a trainer, where methods may be too.

    Raises:
        ValueError: it does; names the class, each such method, and the remedy.
    """
    hooks = uncalled_hooks(trainer_class)
    defined = dict.fromkeys([*overridden(trainer_class, *hooks), *(name for name in hooks if name in attributes)])
    dead = [name for name in defined if not _calls_itself(trainer_class, name)]
    if dead:
        remedies = "; ".join(f"{name}: {hooks[name]}" for name in dead)
        raise ValueError(
            f"{trainer_class.__name__} defines {', '.join(f'{name}()' for name in dead)}, which TRL's trainer calls "
            f"and trl_fast's never does, so it would have no effect. {remedies}"
        )


def _is_of_a_library(owner: type) -> bool:
    return owner.__module__.partition(".")[0] in _LIBRARIES


def _is_put_in(value: Any) -> bool:
    """Says whether a class's method is a function of none of the libraries."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
    while _home(function) in _DECORATORS and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return _home(function) not in (*_LIBRARIES, *_DECORATORS, "")


def _home(function: Any) -> str:
    """Returns the package whose code a function runs, whatever it says of itself; "" for what is no function."""
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0]


def _calls_itself(trainer_class: type, name: str) -> bool:
    """Says whether another method of the user's classes reads the name."""
    methods = [
        value
        for owner in trainer_class.__mro__
        if not _is_of_a_library(owner)
        for other, value in vars(owner).items()
        if other != name
    ]
    return any(name in names for method in methods for names in _names_read(method))


def _names_read(method: Any) -> Iterator[tuple[str, ...]]:
    """Yields the names that a function's code reads, and those of the functions inside it."""
    function = inspect.unwrap(getattr(method, "fget", None) or getattr(method, "__func__", None) or method)
    codes = [function.__code__] if inspect.isfunction(function) else []
    while codes:
        code = codes.pop()
        yield code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
