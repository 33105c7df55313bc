"""Copies within the CPU in place of those to and from a GPU, each as late as it may be."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Left(NamedTuple):
    """A tensor that left: its shape, and where its memory is."""

    shape: torch.Size
    address: int


@dataclass
class Copy:
    """Holds what a tensor was when it was copied; values only then."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor | None = None


class LateCopies:
    """`offload_schedule.Copies` that are made when something waits for them, and not before.

    A copy whose source or target is gone by then fails; what is read before its copy came back is NaN.
    """

    def __init__(self) -> None:
        self.left: list[Left] = []
        self.asked_back = 0
        self.forgotten = 0
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._abandoned: list[torch.Tensor] = []

    def to_host(self, tensor: torch.Tensor) -> Copy:
        self.left.append(Left(tensor.shape, tensor.untyped_storage().data_ptr()))
        copy = Copy(tensor.shape, tensor.stride(), tensor.dtype)
        read = _weakly(tensor)

        def make() -> None:
            copy.values = read().clone()

        self._queue.append(make)
        return copy

    def to_device(self, copy: Copy) -> torch.Tensor:
        self.asked_back += 1
        target = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype)
        target.fill_(float("nan") if copy.dtype.is_floating_point else 77)
        read = _weakly(target)
        self._queue.append(lambda: read().copy_(copy.values))
        return target

    def event(self) -> int:
        return len(self._queue)

    def wait(self, event: int) -> None:
        while self._done < event:
            self._queue[self._done]()
            self._done += 1

    def abandon(self, tensor: torch.Tensor) -> None:
        self._abandoned.append(tensor)

    def forget(self, copy: Copy) -> None:
        self.forgotten += 1

    def finish(self) -> None:
        """Makes what nobody has waited for."""
        self.wait(self.event())


def _weakly(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Gives a tensor as long as its memory is there, which this does not hold."""
    storage = weakref.ref(tensor.untyped_storage())
    dtype, place = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())

    def read() -> torch.Tensor:
        assert storage() is not None, f"memory of {tuple(place[1])} was freed while its copy was on its way"
        return torch.empty(0, dtype=dtype).set_(storage(), *place)

    return read
