"""Counts what operators do on fake tensors: operations, bytes, launches, host waits, memory.

One rule serves all operators: what an operator is given is read once from memory, what it returns is written once.
What it changes in place is read and written, what it gets as `out` is written. A tensor repeated by strides of zero
counts once, the same tensor given twice too. Views, and tensors that are only made, are free. The table of exceptions
below has those that touch less than they are given, and those that overwrite what they change.

Bytes of an operator include what stays in the cache between two operators: a number of bytes written by one and read
by the next counts twice.
"""

from __future__ import annotations

import collections
import math
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from trl_fast.planning.memory_tracker import CUDA_GRANULARITY

from .fake_devices import is_on_gpu
from .flops import flops_of
from .gpu_rates import Gpu
from .host_wait_rule import has_mask, makes_host_wait

aten = torch.ops.aten
# Where a wait is looked for in the source: the innermost frame outside of torch and of this package.
_NOT_THE_PLACE = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

# Operators that only make or describe tensors.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "is_pinned"}
# In place, without a look at what was there.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
# They read the rows that an index asks for, not the whole tensor that it points into.
_GATHERING = {"index", "index_select", "gather", "embedding", "take"}
# They write as much as they are given to put somewhere; those in the second line add it to what is there.
_SCATTERING = {"index_copy_", "index_put_", "scatter_"}
_ADDING = {"index_add_", "scatter_add_"}
# AdamW's schema has gradients as changed, for a scaler that is not there.
_ONLY_READ = {("_fused_adamw_", "grads")}


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
        given = _by_name(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if makes_host_wait(func, args, kwargs, out):
            self.counts.waits[_place()] += 1
        on_gpu = [tensor for tensor in tensors if is_on_gpu(tensor)]
        if not (on_gpu or results) or _name(func) in _FREE:
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

    def launch(self, name: str, read: int, written: int) -> None:
        """Counts a kernel that is no operator."""
        self.counts.add(name, read, written)

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


def touched(
    func: torch._ops.OpOverload, given: dict[str, Any], tensors: list[FakeTensor], results: list[FakeTensor]
) -> tuple[int, int]:
    """Counts the bytes that an operator reads and writes. given: arguments by name; tensors: those on the GPU."""
    name = _name(func)
    changed, overwritten = _changed(func, given)
    there = {tensor.untyped_storage()._cdata for tensor in tensors}
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in there]
    if not changed and not made:
        return 0, 0
    written = extent(made) + extent(changed)
    if name in _GATHERING:
        return extent([t for t in tensors if not t.is_floating_point()]) + written, written
    if (name in _SCATTERING or name in _ADDING) and not has_mask(given.get("indices")):
        put = [tensor for tensor in tensors if all(tensor is not other for other in changed)]
        values = extent([tensor for tensor in put if tensor.dtype == changed[0].dtype])
        return extent(put) + (values if name in _ADDING else 0), values
    return extent([tensor for tensor in tensors if id(tensor) not in overwritten]), written


def _name(func: torch._ops.OpOverload) -> str:
    """Returns the operator's name without its namespace and overload."""
    return func._schema.name.rpartition("::")[2]


def _by_name(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> dict[str, Any]:
    names = (argument.name for argument in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _changed(func: torch._ops.OpOverload, given: dict[str, Any]) -> tuple[list[FakeTensor], set[int]]:
    """Returns the tensors that an operator changes in place, and which of them (by id) it only writes."""
    changed, overwritten = [], set()
    for argument in func._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        found = [leaf for leaf in tree_leaves(given.get(argument.name)) if is_on_gpu(leaf)]
        if (_name(func), argument.name) in _ONLY_READ:
            continue
        changed.extend(found)
        if _is_result(func, argument.name) or _name(func) in _OVERWRITING or given.get("beta") == 0:
            overwritten.update(map(id, found))
    inputs = {
        id(leaf)
        for argument in func._schema.arguments
        if argument.alias_info is None and not (argument.name == "self" and given.get("beta") == 0)
        for leaf in tree_leaves(given.get(argument.name))
    }
    # What comes as an operand too, as the sum in addmm(total, a, b, out=total), is read.
    return changed, overwritten - inputs


def _is_result(func: torch._ops.OpOverload, argument: str) -> bool:
    """Says whether an operator only writes what it changes: our row kernels look at nothing but the rows' state."""
    return argument == "out" or (func.namespace == "trl_fast" and argument != "state")


def extent(tensors: list[FakeTensor]) -> int:
    """Counts the bytes of tensors, each once; repetitions by a stride of zero are there once."""
    sizes = {}
    for tensor in tensors:
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        lengths = zip(tensor.shape, tensor.stride(), strict=True)
        sizes[key] = math.prod(size for size, stride in lengths if stride or not size) * tensor.element_size()
    return sum(sizes.values())


def _place() -> str:
    """Returns file and line of the code that is running, outside of torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_PLACE):
        frame = frame.f_back
    return f"{_short(frame.f_code.co_filename)}:{frame.f_lineno}"


def _short(path: str) -> str:
    """Returns a path from its package on."""
    return path.rpartition("site-packages/")[2].removeprefix(f"{Path.cwd()}/")
