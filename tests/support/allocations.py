"""Watches which large tensors are made, and which of them are still in memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class LargeTensors(TorchDispatchMode):
    """Notes the tensors of at least so many floats that are made while it is entered, by what their memory is."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._numbers = numbers
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(made):
            storage = tensor.untyped_storage()
            new, size = storage.data_ptr() not in given, self._numbers * tensor.element_size()
            if new and tensor.is_floating_point() and storage.nbytes() >= size:
                self._made.append((StorageWeakRef(storage), size))
        return made

    @property
    def made(self) -> int:
        """How many were made."""
        return len(self._made)

    def alive(self) -> int:
        """How many of them are in memory still, as large as that: what an engine has emptied does not count.

        A thread of gloo's lets go of what it has gathered a moment after the processes go on, so they are looked at
        again for half a second, until none is there.
        """
        patience = time.monotonic() + 0.5
        while (count := self._alive()) and time.monotonic() < patience:
            time.sleep(0.01)
        return count

    def _alive(self) -> int:
        found = (
            (torch.UntypedStorage._new_with_weak_ptr(reference.cdata), size)
            for reference, size in self._made
            if not reference.expired()
        )
        return sum(storage is not None and storage.nbytes() >= size for storage, size in found)


def tensors_in(values: object) -> list[torch.Tensor]:
    """The tensors among values, but for DTensors, whose local parts are seen on their own."""
    return [each for each in tree_leaves(values) if type(each) in (torch.Tensor, torch.nn.Parameter)]


@contextmanager
def unseen_gathers() -> Iterator[None]:
    """Hides within the context what FSDP2 and ZeRO-3 make to gather weights from every mode."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    places = [(FSDPParamGroup, "unshard"), (FSDPParamGroup, "wait_for_unshard")]
    try:
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    except ImportError:
        pass
    else:
        places.append((PartitionedParameterCoordinator, "fetch_sub_module"))
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]

    def hidden(original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return original(*args, **kwargs)

        return call

    try:
        for owner, name, original in originals:
            setattr(owner, name, hidden(original))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
