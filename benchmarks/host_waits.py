"""Where the host waits for the GPU, by the lines of the source that make it wait.

On a GPU torch's sync debug mode tells of waits. Without one, operators are looked at on the roofline's fake GPU: the
same Python code takes the same ways there. A wait is the doing of whoever asked for it, the innermost frame outside of
torch and Python's own library: where transformers looks into a mask that we gave it, the wait is transformers'. In a
backward pass of torch's own operators there is no such frame; those waits are autograd's.
"""

from __future__ import annotations

import collections
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves

from .roofline.fake_devices import is_on_gpu
from .roofline.fake_gpu import fake_gpu
from .roofline.gpu_rates import GPUS
from .roofline.operator_counter import Counter

AUTOGRAD = "autograd"
# What is between the code that asks and the operator: modules that watch, packages that others ask through.
_WATCHING = (__name__, f"{__package__}.roofline.")
_TRANSPARENT = frozenset(("torch", *sys.stdlib_module_names))
_BACKWARD = "_engine_run_backward"
_WARNING = "synchronizing CUDA operation"

# Operators that read a number or need one to know their result's size.
_READING = frozenset(
    ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")
    + ("_unique2", "unique_dim", "unique_consecutive")
)
_INDEXING = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))


class Wait(NamedTuple):
    """owner: the package whose code asked, or AUTOGRAD; place: file:line and function; what: the operator."""

    owner: str
    place: str
    what: str


@dataclass
class HostWaits:
    """The waits since the last `clear`, in order."""

    waits: list[Wait] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets them, as after a warm-up."""
        self.waits.clear()

    def of(self, *owners: str) -> list[Wait]:
        """Those that these packages asked for."""
        return [wait for wait in self.waits if wait.owner in owners]

    def report(self) -> list[str]:
        """Lines that say how often which code waited, the most frequent first."""
        return [
            f"{count} × {wait.place} ({wait.what})" for wait, count in collections.Counter(self.waits).most_common()
        ]


@contextmanager
def host_waits(gpu: str = "h100") -> Iterator[HostWaits]:
    """Within, the host's waits for the GPU are noted; gpu: which one is pretended, of `GPUS`, where there is none."""
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
    """What was pinned, by storage; kept alive, so that no other memory is taken for it."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in pinned memory."""
        copy = tensor.clone()
        self._tensors[copy.untyped_storage()._cdata] = copy
        return copy

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._tensors


def makes_host_wait(
    func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any, pinned: Iterable[torch.Tensor] = ()
) -> bool:
    """Whether an operator, run on fake tensors, makes the host wait for the GPU.

    It reads numbers, needs them to know a size, or copies to or from memory that is not pinned. pinned: whether it
    contains a CPU tensor says whether that is pinned.
    """
    name = func._schema.name.rpartition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [is_on_gpu(tensor) for tensor in tensors]
    if name in ("_to_copy", "copy_"):
        source, target = (tensors[0], out) if name == "_to_copy" else (tensors[1], tensors[0])
        crosses = is_on_gpu(source) != is_on_gpu(target)
        waits_for_none = _given(func, args, kwargs, "non_blocking") and (is_on_gpu(source) or source in pinned)
        # A number on the CPU is handed to the kernel.
        number = name == "copy_" and not is_on_gpu(source) and source.dim() == 0
        return crosses and not waits_for_none and not number
    if not any(on_gpu):
        return False
    if name in _INDEXING:
        return _index_waits(name, args)
    if name == "repeat_interleave":
        return _given(func, args, kwargs, "output_size") is None
    return name in _READING


def _index_waits(name: str, args: tuple) -> bool:
    """Whether an index has to be counted, or to be brought to the GPU first."""
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        # One number put where a mask is set needs no count.
        return name == "index" or args[2].numel() != 1
    return not all(map(is_on_gpu, indices))


def _given(func: torch._ops.OpOverload, args: tuple, kwargs: dict, name: str) -> Any:
    """An argument by name, None where it was not given."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get(name)


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
    """A path from its package on."""
    return path.rpartition("site-packages/")[2].removeprefix(f"{sys.path[0]}/")
