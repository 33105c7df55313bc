"""Runs a test's work in a process of its own, where limits and the heap are nobody else's."""

import os
import subprocess
import sys
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


def fresh(module: str, function: str, *arguments: str) -> None:
    """Calls a test module's function in a new interpreter; fails with what it printed.

    A fork has its parent's heap: what others freed there, and how glibc then keeps memory.
    """
    call = f"import {module}; {module}.{function}(*{arguments!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
