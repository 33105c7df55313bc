"""Keeps the memory of freed tensors from one training step to the next.

A step on a CPU frees gigabytes of activations and takes as much again in the next. glibc gives large blocks back to
the system, and the system clears each page before it hands it out anew: 130,000 pages a step of SmolLM2-135M on 1200
tokens. Large tensors therefore come from a heap of their own (csrc/cpu/tensor_heap.h), and glibc keeps the rest: small
tensors, and what libraries take for themselves. Between steps a process stays as large as it was within.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .backends import load_extension

logger = logging.getLogger(__name__)

# mallopt's parameters (malloc.h), and glibc's values for them: of both thresholds the most that it raises them to.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_TRIM_THRESHOLD: 64 << 20, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}
# What glibc reads when a process starts: who set one of them has chosen.
_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Keeps freed memory in the process within the context, and gives it to the system at its end.

    Nothing is done where `device`, that of the training, is no CPU, with TRL_FAST_HELD_BYTES=0, or where the
    environment chooses how glibc keeps memory.
    """
    if device.type != "cpu" or _environment_chooses():
        yield
        return
    with _tensor_heap_used(), _rest_kept():
        yield


def _environment_chooses() -> bool:
    if os.environ.get("TRL_FAST_HELD_BYTES") == "0" or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return True
    return any(name in os.environ for name in _CHOICES)


@contextmanager
def _tensor_heap_used() -> Iterator[None]:
    """Makes large tensors in the extension's heap; where there is no extension or no room for addresses, nowhere."""
    if not load_extension().ok:
        yield
        return
    from trl_fast import _C

    if not _C.keep_freed():
        _say_addresses_are_limited()
        yield
        return
    try:
        yield
    finally:
        _C.give_back_freed()


@functools.cache
def _say_addresses_are_limited() -> None:
    logger.warning(
        "The address space is limited (ulimit -v): freed tensors are not kept in a heap of their own, and steps may "
        "take more memory, and take it from the system anew."
    )


@contextmanager
def _rest_kept() -> Iterator[None]:
    """Has glibc keep what is freed to it, where it is the C library.

    By itself, it raises its thresholds with the blocks that a process frees; after a context they are as high as they
    would become.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """Returns the process's C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
