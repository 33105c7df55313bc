"""Counts what operators do on fake tensors: operations, bytes, launches, host waits, memory.

What an operator does is counted by `trl_fast.planning.roofline`, which the planner goes by too.
"""

from __future__ import annotations

import collections
import re
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from trl_fast.planning.gpu_facts import Gpu
from trl_fast.planning.memory_tracker import CUDA_GRANULARITY
from trl_fast.planning.roofline.bytes_moved import FREE, by_name, extent, name_of, touched
from trl_fast.planning.roofline.flops import flops_of
from trl_fast.planning.roofline.launches import Launch

from .fake_devices import is_on_gpu
from .host_wait_rule import makes_host_wait

# Products and attention, the head's kernels, the optimizer's: what is left of a step goes number by number.
_NOT_ELEMENTWISE = re.compile(
    r"(.*::)?(mm|addmm_?|bmm|baddbmm|\w*attention\w*|merge_kernel|merge_tiles_kernel|linear_scores_kernel|row_\w+"
    r"|_\w+_kernel|_fused_adamw_|_foreach_\w+)(\..*)?"
)
# Where a wait is looked for in the source: the innermost frame outside of torch and of this package.
_NOT_THE_PLACE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass
class Tally:
    """Holds what one kind of operator came to."""

    calls: int = 0
    flops: float = 0.0
    read: int = 0
    written: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass
class Counts:
    """Holds a piece of code's work, by operator; waits: where the host waits for the GPU, by place in the source."""

    by_operator: dict[str, Tally] = field(default_factory=lambda: collections.defaultdict(Tally))
    narrow_flops: float = 0.0
    float32_flops: float = 0.0
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    peak_bytes: int = 0
    # What products read of factors that were there before: part of their rate, and of `read` no more.
    factors: int = 0

    @property
    def flops(self) -> float:
        return self.narrow_flops + self.float32_flops

    @property
    def read(self) -> int:
        return sum(tally.read for tally in self.by_operator.values())

    @property
    def written(self) -> int:
        return sum(tally.written for tally in self.by_operator.values())

    @property
    def moved(self) -> int:
        return self.read + self.written

    @property
    def elementwise(self) -> int:
        """Counts the bytes that go number by number: norms, activations, rotations, sums, conversions, copies."""
        return sum(tally.moved for name, tally in self.by_operator.items() if not re.fullmatch(_NOT_ELEMENTWISE, name))

    @property
    def launches(self) -> int:
        return sum(tally.calls for tally in self.by_operator.values())

    def add(self, operator: str, read: int, written: int, flops: float = 0.0, float32: bool = False) -> None:
        """Adds one more launch of an operator."""
        tally = self.by_operator[operator]
        tally.calls += 1
        tally.flops += flops
        tally.read += read
        tally.written += written
        if float32:
            self.float32_flops += flops
        else:
            self.narrow_flops += flops

    def milliseconds(self, gpu: Gpu) -> float:
        """Estimates milliseconds: products at the GPU's rate, then bytes at its rate; launches cost nothing here."""
        return gpu.milliseconds(self.narrow_flops, self.float32_flops, self.moved)


class Counter:
    """Counts the operators that it observes (see `fake_gpu`), and the memory of the tensors that they make."""

    def __init__(self) -> None:
        self.counts = Counts()
        # Bytes of each storage, and the number that it was made as.
        self._live: dict[int, tuple[int, int]] = {}
        self._made = self._start = 0
        self._live_bytes = self._highest_bytes = self._start_bytes = 0

    def start(self) -> None:
        """Forgets what was counted; memory counts from here on."""
        self.counts = Counts()
        self._start_bytes = self._live_bytes
        self._start = self._made

    def observe(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> None:
        """Counts one operator, its arguments and its result."""
        results = [leaf for leaf in tree_leaves(out) if is_on_gpu(leaf)]
        for tensor in results:
            self._see(tensor)
        given = by_name(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if makes_host_wait(func, args, kwargs, out):
            self.counts.waits[_place()] += 1
        on_gpu = [tensor for tensor in tensors if is_on_gpu(tensor)]
        if not (on_gpu or results) or name_of(func) in FREE:
            return
        read, written = touched(func, given, on_gpu, results)
        if read or written:
            operations = flops_of(func, given)
            brought = extent([factor for factor in operations.factors if self._was_given(factor)])
            self.counts.factors += brought
            self.counts.add(func.name(), read - brought, written, operations.flops, operations.float32)

    def _was_given(self, tensor: FakeTensor) -> bool:
        """Says whether the code that is counted found this tensor, rather than made it."""
        return self._live.get(tensor.untyped_storage()._cdata, (0, 0))[1] < self._start

    def add(self, name: str, read: int, written: int, flops: float = 0.0) -> None:
        """Counts a kernel that is no operator."""
        self.counts.add(name, read, written, flops)

    def launch(self, launch: Launch) -> None:
        """Counts a launch of a Triton kernel of ours."""
        brought = extent([factor for factor in launch.factors if self._was_given(factor)])
        self.counts.factors += brought
        read = extent([*launch.factors, *launch.read]) - brought
        self.add(f"trl_fast::{launch.name}_kernel", read, extent([*launch.written]), launch.flops)

    def _see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            size = -(-storage.nbytes() // CUDA_GRANULARITY) * CUDA_GRANULARITY
            self._live[key] = (size, self._made)
            self._made += 1
            self._live_bytes += size
            self._highest_bytes = max(self._highest_bytes, self._live_bytes)
            self.counts.peak_bytes = max(self.counts.peak_bytes, self._live_bytes - self._start_bytes)
            weakref.finalize(storage, self._drop, key)

    @property
    def live_bytes(self) -> int:
        """Counts the bytes of all tensors that are alive on the GPU."""
        return self._live_bytes

    @property
    def highest_bytes(self) -> int:
        """Returns the most that the live bytes ever were."""
        return self._highest_bytes

    def _drop(self, key: int) -> None:
        self._live_bytes -= self._live.pop(key)[0]


def _place() -> str:
    """Returns file and line of the code that is running, outside of torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_PLACE):
        frame = frame.f_back
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(path: str) -> str:
    """Returns a path from its package on."""
    return path.rpartition("site-packages/")[2].removeprefix(f"{Path.cwd()}/")
