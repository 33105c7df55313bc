"""Runs users' async functions, in an event loop of their own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Iterable
from typing import Any


def run_together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Returns what the awaitables give, all of them awaited side by side; the first error is raised."""

    async def together() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run_coroutine_threadsafe(together(), _event_loop()).result()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Returns one loop in one thread as long as the process lives, so that open connections stay usable."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async functions", daemon=True).start()
    return loop
