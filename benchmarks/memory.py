"""Measures the peak memory of a piece of code at torch's own allocators.

A TorchDispatchMode does not see what happens inside a custom op, and the process's resident size does not see memory
that is used twice. The allocators see everything that lives in tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch.profiler import ProfilerActivity, profile

from trl_fast.ops.backends import load_extension

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Measured:
    """Holds a call's result and how many bytes of tensors were alive at its peak, beyond those at its start.

    operators: names of the operators that ran, on the CPU ("aten::mm", "trl_fast::row_scores").
    """

    result: Any
    peak_bytes: int
    operators: frozenset[str] = frozenset()


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
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Measured(result, peak, frozenset(event.name() for event in events))


def process_peak_bytes() -> int:
    """Returns the largest resident size of this process so far (Linux); with a GPU, of torch's allocations there.

    getrusage would count the process that started this one, too.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmHWM"].split()[0])
