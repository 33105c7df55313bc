"""Records when memory is taken and given back in a computation on fake tensors.

Fake tensors (torch's FakeTensorMode) have shapes, dtypes and storages, but no data. What a program takes and frees can
so be followed without having it: its own Python code decides, as in a real run, how long a tensor lives.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from .data_dependent_operators import run_on_fakes
from .memory_timeline import Allocation, Timeline
from .roofline.known_values import follow

# What torch.cuda's allocator rounds up to.
CUDA_GRANULARITY = 512
Workspace = Callable[[torch._ops.OpOverload, tuple], int]
Observer = Callable[[torch._ops.OpOverload, tuple, dict, Any], None]


@dataclass
class _Stage:
    name: str
    start: int


class MemoryTracker(TorchDispatchMode):
    """Records every storage that an operator makes, inside `FakeTensorMode`; time is counted in operators.

    The project's own custom ops are run by their bodies, so that what they take inside is seen too. What depends on
    data is known or answered, see `data_dependent_operators.py`.

    Args:
        granularity: bytes that sizes are rounded up to.
        workspace: bytes that an operator takes inside and gives back, given the operator and its arguments.
        kernels: custom ops that are one kernel on the device: of these, only the results take memory.
        kinds_by_code: the kind of what is taken while a function with that code is at work.
        observe: is shown every operator, its arguments and its result.
    """

    def __init__(
        self,
        granularity: int = 1,
        workspace: Workspace | None = None,
        kernels: Collection[str] = (),
        kinds_by_code: Mapping[CodeType, str] | None = None,
        observe: Observer | None = None,
    ) -> None:
        super().__init__()
        self._observe = observe
        self._kernels = kernels
        self._kinds_by_code = kinds_by_code or {}
        self._granularity = granularity
        self._workspace = workspace
        self._allocations: list[Allocation] = []
        self._live: dict[int, Allocation] = {}
        self._stages: list[_Stage] = []
        self._kind: str | None = None
        self._clock = 0

    # ---- what the simulated program says about itself

    def enter(self, stage: str) -> None:
        """Starts a stage of the step; what was before the first one is no part of the timeline."""
        if not self._stages or self._stages[-1].name != stage:
            self._stages.append(_Stage(stage, self._clock + 1))

    def start_again(self) -> None:
        """Forgets the stages of a step that came before; memory that it left is there from the start."""
        self._stages.clear()

    @property
    def stage(self) -> str | None:
        """Returns the present stage's name."""
        return self._stages[-1].name if self._stages else None

    def was_there(self, tensor: torch.Tensor) -> bool:
        """Says whether a tensor, of any shape, was there before the first stage."""
        allocation = self._live.get(tensor.untyped_storage()._cdata)
        return allocation is not None and bool(self._stages) and allocation.start < self._stages[0].start

    @contextmanager
    def labelling(self, kind: str) -> Iterator[None]:
        """Gives the memory that is taken within this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def label(self, tensor: torch.Tensor, kind: str) -> None:
        """Gives the memory of a tensor, of any shape, this kind."""
        self._live[tensor.untyped_storage()._cdata].kind = kind

    def timeline(self) -> Timeline:
        """Returns what was found so far."""
        ends = [stage.start - 1 for stage in self._stages[1:]]
        stages = tuple(
            (stage.name, stage.start, end) for stage, end in zip(self._stages, [*ends, self._clock], strict=True)
        )
        return Timeline.of(self._allocations, stages)

    # ---- what happens at each operator

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        self._clock += 1
        if self._workspace is not None and (inside := self._workspace(func, args)):
            self._record(inside, self._clock)
        own = OPDEFS.get(func.name())
        if own is not None and func.name() not in self._kernels:
            with self:
                out = own._init_fn(*args, **kwargs or {})
        else:
            out = run_on_fakes(func, args, kwargs or {})
            follow(func, args, kwargs or {}, out)
            if self._observe is not None:
                self._observe(func, args, kwargs or {}, out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, FakeTensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = self._record(storage.nbytes(), None)
            weakref.finalize(storage, self._drop, key)

    def _record(self, size: int, end: int | None) -> Allocation:
        size = -(-size // self._granularity) * self._granularity
        allocation = Allocation(size, self._clock, self.stage, self._kind or self._kind_of_code(), end)
        self._allocations.append(allocation)
        return allocation

    def _kind_of_code(self) -> str | None:
        """Returns the kind that goes with a function at work, if there is one."""
        frame = sys._getframe(1) if self._kinds_by_code else None
        while frame is not None:
            if (kind := self._kinds_by_code.get(frame.f_code)) is not None:
                return kind
            frame = frame.f_back
        return None

    def _drop(self, key: int) -> None:
        # The operator that ran last still had it.
        self._live.pop(key).end = self._clock
