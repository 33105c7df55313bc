"""Lets worker processes answer `import trl` as their parent does.

A process that multiprocessing starts by spawn or forkserver is a fresh interpreter: it imports the script again, and
with it trl. Before that, it unpickles what its parent tells it about itself. There an object is added whose unpickling
puts the finder in place. Forked processes have it anyway.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

# datasets starts its workers by the second one.
_PACKAGES = ("multiprocessing", "multiprocess")
_KEY = "import trl gives trl_fast"


class Alias:
    """Calls a function where it is unpickled."""

    def __init__(self, install: Callable[[], None]) -> None:
        self.install = install

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return self.install, ()


def tell_workers(install: Callable[[], None], is_installed: Callable[[], bool]) -> None:
    """Lets processes that are started from here on call `install` first, if `is_installed` says so then."""
    for package in _PACKAGES:
        spawn: Any = importlib.import_module(f"{package}.spawn")
        if not hasattr(spawn.get_preparation_data, "tells_workers"):
            spawn.get_preparation_data = _telling(spawn.get_preparation_data, install, is_installed)


def _telling(
    get_preparation_data: Callable, install: Callable[[], None], is_installed: Callable[[], bool]
) -> Callable:
    @functools.wraps(get_preparation_data)
    def with_alias(name: str) -> dict[str, Any]:
        data = get_preparation_data(name)
        return {**data, _KEY: Alias(install)} if is_installed() else data

    with_alias.tells_workers = True  # type: ignore[attr-defined]
    return with_alias
