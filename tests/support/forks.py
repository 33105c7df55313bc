"""Runs a test's work in a process of its own, where limits and the heap are nobody else's."""

import os
import traceback
from collections.abc import Callable

import torch


def forked(work: Callable[[], None]) -> None:
    """Runs `work` in a fork, with one thread; fails with its traceback."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        said = b""
        try:
            torch.set_num_threads(1)
            work()
        except BaseException:
            said = traceback.format_exc().encode()
        os.write(writer, said[-4000:])
        os._exit(bool(said))
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    _, status = os.waitpid(process, 0)
    assert status == 0, text or f"wait status {status}"
