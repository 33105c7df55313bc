"""Holds the helpers around Python itself that TRL's trainers share with scripts: functions, threads, nested values."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Nested = TypeVar("Nested", list, Mapping)
Value = TypeVar("Value")


def identity(x: Value) -> Value:
    """Returns what it is given."""
    return x


def get_callable_name(func: Callable) -> str:
    """Returns a function's name, a partial's that of what it wraps, an object's that of its class."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def is_async_callable(func: Callable) -> bool:
    """Says whether a call gives a coroutine: of a function, a partial of one, or an object with `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(type(func).__call__)


def remove_none_values(example: Any) -> Any:
    """Returns nested lists and dicts without the keys whose value is None, such as Arrow adds to rows.

    Raises:
        TypeError: it is neither a list nor a dict.
    """
    if isinstance(example, list):
        return [_clean(value) for value in example]
    if isinstance(example, Mapping):
        return {key: _clean(value) for key, value in example.items() if value is not None}
    raise TypeError(f"remove_none_values: expected a list or a dict, got {type(example).__name__}")


def _clean(value: Any) -> Any:
    return remove_none_values(value) if isinstance(value, (dict, list)) else value


def start_event_loop_in_daemon(
    name: str | None = None,
) -> tuple[threading.Thread, asyncio.AbstractEventLoop, threading.Event]:
    """Starts an event loop in a thread of its own, which does not keep the program alive.

    Returns:
        The thread, the loop, and an event that is set when the loop is about to run.
    """
    loop, ready = asyncio.new_event_loop(), threading.Event()

    def run() -> None:
        asyncio.set_event_loop(loop)
        ready.set()
        loop.run_forever()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread, loop, ready


def shutdown_event_loop_in_daemon(
    thread: threading.Thread | None, loop: asyncio.AbstractEventLoop | None, timeout: float = 5.0
) -> None:
    """Stops the loop of start_event_loop_in_daemon, and waits up to `timeout` seconds for its thread."""
    if thread is not None and loop is not None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout)
