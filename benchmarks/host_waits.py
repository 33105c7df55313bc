"""Finds where the host waits for the GPU, by the lines of the source that make it wait.

On a GPU torch's sync debug mode tells of waits. Without one, operators are looked at on the roofline's fake GPU: the
same Python code takes the same ways there. A wait is the doing of whoever asked for it, the innermost frame outside of
torch and Python's own library: where transformers looks into a mask that we gave it, the wait is transformers'. In a
backward pass of torch's own operators there is no such frame; those waits are autograd's.
"""

from __future__ import annotations

import collections
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch

from trl_fast.planning.gpu_facts import GPUS

from .roofline.fake_gpu import fake_gpu
from .roofline.host_wait_rule import makes_host_wait
from .roofline.operator_counter import Counter

AUTOGRAD = "autograd"
# What is between the code that asks and the operator: modules that watch, packages that others ask through.
_WATCHING = (__name__, f"{__package__}.roofline.")
_TRANSPARENT = frozenset(("torch", *sys.stdlib_module_names))
_BACKWARD = "_engine_run_backward"
_WARNING = "synchronizing CUDA operation"


class Wait(NamedTuple):
    """Describes a wait. owner: the package that asked, or AUTOGRAD; place: file:line and function; what: operator."""

    owner: str
    place: str
    what: str


@dataclass
class HostWaits:
    """Holds the waits since the last `clear`, in order."""

    waits: list[Wait] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets them, as after a warm-up."""
        self.waits.clear()

    def of(self, *owners: str) -> list[Wait]:
        """Returns those that these packages asked for."""
        return [wait for wait in self.waits if wait.owner in owners]

    def report(self) -> list[str]:
        """Returns lines that say how often which code waited, the most frequent first."""
        return [
            f"{count} × {wait.place} ({wait.what})" for wait, count in collections.Counter(self.waits).most_common()
        ]


@contextmanager
def host_waits(gpu: str = "h100-80") -> Iterator[HostWaits]:
    """Notes the host's waits for the GPU within; gpu: which of `GPUS` is simulated, where there is none."""
    found = HostWaits()
    with _warned(found) if torch.cuda.is_available() else _pretended(found, gpu):
        yield found


@contextmanager
def _warned(found: HostWaits) -> Iterator[None]:
    """Waits as CUDA reports them; torch hands on those of a backward pass at its end, so they count as autograd's."""

    def note(message: Warning | str, *rest: Any, **options: Any) -> None:
        if _WARNING in str(message):
            found.waits.append(_asked_for("CUDA"))
        else:
            show(message, *rest, **options)

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = note
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _pretended(found: HostWaits, gpu: str) -> Iterator[None]:
    """Waits as operators on fake tensors tell of them; pinned memory is remembered, since a CPU alone has none."""
    pinned = _PinnedMemory()

    class Watch(Counter):
        def observe(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> None:
            super().observe(func, args, kwargs, out)
            if makes_host_wait(func, args, kwargs, out, pinned):
                found.waits.append(_asked_for(func.name()))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: pinned.pin(tensor)))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_pinned", lambda tensor: tensor in pinned))
        stack.enter_context(fake_gpu(GPUS[gpu], Watch()))
        yield


class _PinnedMemory:
    """Holds what was pinned, by storage; it is kept alive, so that no other memory is taken for it."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a copy in pinned memory."""
        copy = tensor.clone()
        self._tensors[copy.untyped_storage()._cdata] = copy
        return copy

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._tensors


def _asked_for(what: str) -> Wait:
    frame = sys._getframe(1)
    while frame is not None:
        module, code = frame.f_globals.get("__name__", ""), frame.f_code
        package = module.partition(".")[0]
        if package == "torch" and code.co_name == _BACKWARD:
            return Wait(AUTOGRAD, "a backward pass", what)
        if package not in _TRANSPARENT and not module.startswith(_WATCHING):
            return Wait(package, f"{_short(code.co_filename)}:{frame.f_lineno} {code.co_name}", what)
        frame = frame.f_back
    return Wait("", "outside of Python", what)


def _short(path: str) -> str:
    """Returns a path from its package on."""
    return path.rpartition("site-packages/")[2].removeprefix(f"{sys.path[0]}/")
