"""Measures the peak memory of a piece of code at torch's own allocators.

A TorchDispatchMode does not see what happens inside a custom op, and the process's resident size does not see memory
that is used twice. The allocators see everything that lives in tensors.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile

from trl_fast.ops.backends import load_extension

MIB = 1 << 20
GIB = 1 << 30

# Operators whose library may take a buffer of its own for the time of a product.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


@dataclass(frozen=True)
class Measured:
    """Holds a call's result and how many bytes of tensors were alive at its peak, beyond those at its start.

    operators: names of the operators that ran, on the CPU ("aten::mm", "trl_fast::row_scores").
    bytes_beside_products: on the CPU, the peak without what matrix products take and give back by themselves. oneDNN
    has such buffers, whose size depends on the CPU's instructions.
    """

    result: Any
    peak_bytes: int
    operators: frozenset[str] = frozenset()
    bytes_beside_products: int = 0


def measure_peak(function: Callable[[], Any], device: torch.device | str = "cpu") -> Measured:
    """Runs `function` once and measures the peak of live tensor bytes on `device` above the level at its start."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        return Measured(result, torch.cuda.max_memory_allocated(device) - start)
    if load_extension().ok:
        # Blocks that the extension holds from an earlier call may be of another size, and would be counted whole.
        from trl_fast import _C

        _C.release_pool()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    # A product begins before what it takes: of events of one nanosecond the sort keeps the order.
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    names = frozenset(event.name() for event in events)
    return Measured(result, _highest(changes), names, _highest(_beside_products(events)))


def _highest(changes: Iterable[int]) -> int:
    """Returns the highest level that changes of live bytes come to from 0."""
    return max(itertools.accumulate(changes, initial=0))


def _beside_products(events: Iterable[Any]) -> Iterator[int]:
    """Yields the changes of live bytes but those of blocks that a product takes and gives back itself.

    Those of a product are given at its end. events: a profiler's, in the order of their beginnings.
    """
    end, taken = 0, []
    for event in events:
        if event.start_ns() >= end:
            yield from taken
            taken = []
        if event.name() in PRODUCTS:
            end = max(end, event.end_ns())
        elif event.name() == "[memory]" and -event.nbytes() in taken:
            taken.remove(-event.nbytes())
        elif event.name() == "[memory]":
            taken.append(event.nbytes())
    yield from taken


def process_peak_bytes() -> int:
    """Returns the largest resident size of this process so far (Linux); with a GPU, of torch's allocations there.

    getrusage would count the process that started this one, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])
