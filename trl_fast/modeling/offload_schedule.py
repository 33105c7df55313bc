"""When what a model saves for backward leaves the device, and when it comes back.

    forward    layer i is computed | layer i−1 is copied to the CPU | what layer i−2 saved is freed
    backward   layer i is computed | layer i−1 is copied back

Copies are asked for as tensors are saved. Their memory must not be used again before it is copied, so the tensors are
held here until what computes has been told to wait for the copies. To hand them to the allocator with a note
(`record_stream`) would not do: it looks for finished copies when the host asks for memory, and the host is many layers
ahead of the device by then.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Copies between a device and the CPU, one after the other, beside what computes; see `host_copies.HostCopies`."""

    def to_host(self, tensor: torch.Tensor) -> Any:
        """A tensor's copy on the CPU."""

    def to_device(self, copy: Any) -> torch.Tensor:
        """The copy's copy on the device."""

    def event(self) -> Any:
        """Stands for all copies asked for so far."""

    def wait(self, event: Any) -> None:
        """Lets what is computed from now on begin after the copies that an event stands for."""

    def abandon(self, tensor: torch.Tensor) -> None:
        """A tensor that came back is freed, and nobody has waited for its copy."""

    def forget(self, copy: Any) -> None:
        """Nobody asks for a copy on the CPU any more."""


class SavedTensor:
    """A tensor that has left the device, as autograd keeps it."""

    def __init__(self, copy: Any, layer: Layer, copies: Copies) -> None:
        self.layer = layer
        self._copies = copies
        self._copy = copy
        self._back: tuple[torch.Tensor, Any] | None = None

    def fetch(self) -> None:
        """Asks for the copy back, unless that is done."""
        if self._back is None:
            self._back = (self._copies.to_device(self._copy), self._copies.event())

    def restored(self) -> torch.Tensor:
        """The tensor on the device, for what is computed from now on; the layer before is asked for meanwhile."""
        self.layer.enter()
        self.fetch()
        (tensor, event), self._back = self._back, None
        self._copies.wait(event)
        return tensor

    def __del__(self) -> None:
        if self._back is not None:
            self._copies.abandon(self._back[0])
        self._copies.forget(self._copy)


class Layer:
    """What a layer has saved. before: the layer that was computed before it, if that saved anything."""

    def __init__(self, before: Layer | None) -> None:
        self.before = before
        self.saved: list[weakref.ref[SavedTensor]] = []
        # Only until they are copied.
        self.sources: list[torch.Tensor] = []
        self.copied: Any = None
        self._entered = False

    def fetch(self) -> None:
        """Asks for all that is still wanted, in the order in which backward will want it."""
        for saved in filter(None, (reference() for reference in reversed(self.saved))):
            saved.fetch()

    def enter(self) -> None:
        """Backward has come to this layer: its tensors are asked for, unless they are, then the layer's before."""
        if self._entered:
            return
        self._entered = True
        self.fetch()
        if self.before is not None:
            self.before.fetch()


class Schedule:
    """One forward pass on one device, and the backward passes through it."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._layer: Layer | None = None
        self._copying: deque[Layer] = deque()
        self._knows_layers = False

    def start_layer(self) -> None:
        """The tensors to come are another layer's. Where this is never called, each tensor is a layer of its own."""
        self._knows_layers = True
        self._next_layer()

    def save(self, tensor: torch.Tensor) -> SavedTensor:
        """Lets a tensor leave the device."""
        if self._layer is None or not self._knows_layers:
            self._next_layer()
        saved = SavedTensor(self._copies.to_host(tensor), self._layer, self._copies)
        self._layer.saved.append(weakref.ref(saved))
        self._layer.sources.append(tensor)
        return saved

    def end(self) -> None:
        """The forward pass is over: what it saved is freed once it is copied."""
        self._close()
        self._free(keep=0)

    def _next_layer(self) -> None:
        self._close()
        self._free(keep=1)
        self._layer = Layer(self._layer if self._layer is None or self._layer.saved else self._layer.before)

    def _close(self) -> None:
        if self._layer is not None and self._layer.sources:
            self._layer.copied = self._copies.event()
            self._copying.append(self._layer)

    def _free(self, *, keep: int) -> None:
        """Lets go of all layers but the last `keep`."""
        while len(self._copying) > keep:
            layer = self._copying.popleft()
            self._copies.wait(layer.copied)
            layer.sources.clear()
