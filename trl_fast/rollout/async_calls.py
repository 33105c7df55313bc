"""The event loop that users' async functions run in."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Iterable
from typing import Any


def run_together(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """What the awaitables give, all of them awaited side by side; the first error is raised."""

    async def together() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run_coroutine_threadsafe(together(), _event_loop()).result()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop in one thread as long as the process lives: connections that functions keep open stay usable in it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async functions", daemon=True).start()
    return loop
