"""Schedules offloading: when what a model saves for backward leaves the device, and when it comes back.

    forward    layer i is computed | layer i−1 is copied to the CPU | what layer i−2 saved is freed
    backward   layer i is computed | layer i−1 is copied back

Copies are asked for as tensors are saved. Their memory must not be used again before it is copied, so the tensors are
held here until what computes has been told to wait for the copies. To hand them to the allocator with a note
(`record_stream`) would not do: it looks for finished copies when the host asks for memory, and the host is many layers
ahead of the device by then.

What is on its way, out or back early, is limited in bytes too. Where a layer saves more, computing waits for the rest:
on such rows it is slow, and memory is what offloading is for.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, NamedTuple, Protocol

import torch

ROOM_BYTES = 1 << 30


class Copies(Protocol):
    """Makes copies between a device and the CPU, one after the other, beside what computes; see `pinned_copies`."""

    def to_host(self, tensor: torch.Tensor) -> Any:
        """Returns the copy on the CPU of a tensor of any shape and dtype."""

    def to_device(self, copy: Any) -> torch.Tensor:
        """Returns the tensor on the device that a copy on the CPU stands for."""

    def event(self) -> Any:
        """Stands for all copies asked for so far."""

    def wait(self, event: Any) -> None:
        """Lets what is computed from now on begin after the copies that an event stands for."""

    def abandon(self, tensor: torch.Tensor) -> None:
        """Lets go of a tensor (any shape) that came back, and for whose copy nobody has waited."""

    def forget(self, copy: Any) -> None:
        """Lets go of a copy on the CPU that nobody asks for any more."""


class SavedTensor:
    """Stands for a tensor that has left the device; autograd keeps it.

    number, layer: counted over a pass, of those that left, and of layers that any left; size: in bytes.
    """

    def __init__(self, schedule: Schedule, copy: Any, number: int, layer: int, size: int) -> None:
        self.number, self.layer, self.size = number, layer, size
        self._schedule = schedule
        self._copy = copy
        self._back: tuple[torch.Tensor, Any] | None = None

    def fetch(self) -> None:
        """Asks for the copy back, unless that is done."""
        if self._back is None:
            copies = self._schedule.copies
            self._back = (copies.to_device(self._copy), copies.event())
            self._schedule.early_bytes += self.size

    def restored(self) -> torch.Tensor:
        """Returns the tensor on the device, for what is computed from now on; asks for what comes next meanwhile."""
        self.fetch()
        assert self._back is not None  # that is what `fetch` does
        (tensor, event), self._back = self._back, None
        self._schedule.early_bytes -= self.size
        self._schedule.fetch_ahead(self)
        self._schedule.copies.wait(event)
        return tensor

    def __del__(self) -> None:
        if self._back is not None:
            self._schedule.early_bytes -= self.size
            self._schedule.copies.abandon(self._back[0])
        self._schedule.copies.forget(self._copy)


class _Leaving(NamedTuple):
    """Holds a tensor until its copy, for which `event` stands, has been waited for."""

    tensor: torch.Tensor
    event: Any
    layer: int


class Schedule:
    """Schedules the copies of one forward pass on one device, and of the backward passes through it.

    early_bytes: of tensors that came back and have not been asked for yet.
    """

    def __init__(self, copies: Copies, room_bytes: int = ROOM_BYTES) -> None:
        self.copies = copies
        self.early_bytes = 0
        self._room_bytes = room_bytes
        self._saved: list[weakref.ref[SavedTensor]] = []
        self._layer = 0
        self._layer_begins = self._in_layers = False
        self._leaving: deque[_Leaving] = deque()
        self._leaving_bytes = 0
        # All from this number on have been looked at by `fetch_ahead`.
        self._looked_at: int | None = None

    def start_layer(self) -> None:
        """Starts a layer: the tensors to come are its own. If never called, each tensor is a layer of its own."""
        self._in_layers = True
        self._begin_layer()

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        """Lets a tensor (any shape) leave the device; returns what autograd keeps in its place."""
        if not self._in_layers:
            self._begin_layer()
        # Layers that save nothing are none.
        self._layer += self._layer_begins
        self._layer_begins = False
        copy = self.copies.to_host(tensor)
        saved = SavedTensor(self, copy, len(self._saved), self._layer, tensor.nbytes)
        self._saved.append(weakref.ref(saved))
        self._leaving.append(_Leaving(tensor, self.copies.event(), self._layer))
        self._leaving_bytes += tensor.nbytes
        while self._leaving_bytes > self._room_bytes:
            self._free(1)
        return saved

    def end(self) -> None:
        """Ends the forward pass: what it saved is freed once it is copied."""
        self._free(len(self._leaving))

    def fetch_ahead(self, asked: SavedTensor) -> None:
        """Asks for what backward will want next: the rest of a tensor's layer and the layer before, as room allows."""
        start = len(self._saved) if self._looked_at is None else self._looked_at
        for number in reversed(range(start)):
            saved = self._saved[number]()
            if saved is not None and saved.layer <= asked.layer:
                if saved.layer < asked.layer - 1 or self.early_bytes + saved.size > self._room_bytes:
                    break
                if saved is not asked:
                    saved.fetch()
            self._looked_at = number

    def _begin_layer(self) -> None:
        """Begins a layer: the last layer may still be on its way, those before it have to be gone."""
        self._layer_begins = True
        self._free(sum(leaving.layer < self._layer for leaving in self._leaving))

    def _free(self, count: int) -> None:
        """Lets go of the first tensors that are leaving; the last one's copy is made last."""
        freed = [self._leaving.popleft() for _ in range(count)]
        if freed:
            self.copies.wait(freed[-1].event)
        self._leaving_bytes -= sum(leaving.tensor.nbytes for leaving in freed)
