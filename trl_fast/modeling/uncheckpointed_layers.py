"""Chooses the layers that gradient checkpointing leaves alone on a GPU: the last ones, as many as free memory holds.

A layer that is not checkpointed is computed once, with the same bits, and costs the host least. Backward begins with
the last layers: what they saved is gone before a checkpointed layer is computed again and before most gradients are
there. The first layers' would lie beside all of that.

How many is not guessed. A first pass checkpoints all layers and is measured (`Meter`): what each would have saved,
when backward computes it again, and the most that the pass took. At no time does a pass that keeps the last layers
take more than that and what they save: in its head and loss they are all there, and while backward goes through them
they only become fewer. So a pass may spend what is free beyond the measured peak and a margin (`room_for_layers`). The
peak has in it what is still to come of the head's workspace, of gradients, and of other models that run before
backward. An optimizer's averages are made when no activation is left, and are no part of what is free from then on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from trl_fast.ops.device import DeviceMemory, device_facts
from trl_fast.parallel.partitions import whole_shape, whole_size

# The share of a device that is left alone: half of it for a workspace of the head that the measured pass did not fill,
# half for memory that the allocator holds in pieces too small to serve.
MARGIN = 8
# Passes up to so many times as large as the largest measured one are planned by it; larger ones are measured.
STRETCH = 1.25
# Tokens times weights of a layer from which on dispatch modes may look at its operators. They raise the host's time
# for a layer, forward and backward, from 8 to 15 ms (on one core of a server's CPU). 2^41 are, at 8 operations each
# with recomputation, 25 ms of products at 700 TFLOP/s: the host then stays ahead of the device.
LARGE_LAYER = 1 << 41


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Returns the memory of a GPU; None for other devices, whose memory others live in too."""
    return device_facts(device).read_memory()


@dataclass(frozen=True)
class PassSize:
    """Holds the tokens of a forward pass, and those of its longest row."""

    tokens: int
    length: int

    @classmethod
    def of(cls, hidden: torch.Tensor) -> PassSize:
        """Returns the size of a pass of hidden states (B, T, H) or (T, H)."""
        return cls(hidden.shape[:-1].numel(), hidden.shape[-2])

    def over(self, other: PassSize) -> float:
        """Returns how many times as large as another this size is, by the larger of both ratios."""
        return max(self.tokens / other.tokens, self.length / other.length)

    def joined(self, other: PassSize) -> PassSize:
        """Returns the larger of each."""
        return PassSize(max(self.tokens, other.tokens), max(self.length, other.length))


@dataclass(frozen=True)
class Footprint:
    """Holds the memory that passes of up to `size` took whose layers were all checkpointed.

    - `layers`: bytes a token that each layer would have saved, in their order.
    - `casts`: bytes of a layer's weights as autocast makes them, which it saves whatever the tokens.
    - `peak`: the most bytes beyond those at a pass's start; `missing_gradients`: how many gradients' bytes were not
      there at its start, and so are in the peak.
    """

    size: PassSize
    layers: tuple[float, ...]
    casts: int
    peak: int
    missing_gradients: int

    def covers(self, size: PassSize) -> bool:
        """Returns whether a pass of that size can be planned."""
        return size.over(self.size) <= STRETCH

    def layer_bytes(self, size: PassSize) -> list[int]:
        """Returns the bytes that each layer of a pass would save, or more.

        Bytes = c + a · tokens with an unknown c of at most `casts`: fewer tokens leave at most so much more than their
        share.
        """
        more = max(1.0, size.length / self.size.length)
        fixed = self.casts * max(0.0, 1 - size.tokens / self.size.tokens)
        return [int(rate * size.tokens * more + fixed) for rate in self.layers]

    def reserve(self, size: PassSize, missing_gradients: int) -> int:
        """Returns the bytes that a pass needs for itself; missing_gradients: of gradients not there at its start."""
        return int(self.peak * max(1.0, size.over(self.size))) + max(0, missing_gradients - self.missing_gradients)


def merged(one: Footprint | None, two: Footprint | None) -> Footprint | None:
    """Returns a footprint that holds for the passes of both."""
    if one is None or two is None:
        return one or two
    return Footprint(
        one.size.joined(two.size),
        tuple(map(max, one.layers, two.layers)),
        max(one.casts, two.casts),
        max(one.peak, two.peak),
        min(one.missing_gradients, two.missing_gradients),
    )


def room_for_layers(free: int, total: int, reserve: int, asked: int | None) -> int:
    """Returns the bytes that layers may save beyond a checkpointed pass, of a device's free and total bytes.

    reserve: what such a pass takes; asked: the most that the user wants spent.
    """
    room = max(0, free - reserve - total // MARGIN)
    return room if asked is None else min(room, asked)


def layers_that_fit(sizes: Sequence[int], room: int) -> int:
    """Returns how many of the last layers fit into `room` bytes, of layers that save `sizes` bytes."""
    totals = itertools.accumulate(reversed(sizes))
    return sum(1 for _ in itertools.takewhile(lambda total: total <= room, totals))


@dataclass(frozen=True)
class Split:
    """Splits the layers of a pass: the last `whole` are not checkpointed, the others may keep `left` bytes."""

    whole: int
    left: int


def split_layers(
    footprint: Footprint, size: PassSize, memory: DeviceMemory, missing_gradients: int, asked: int | None
) -> Split:
    """Returns the split of a pass of that size that starts now.

    missing_gradients: bytes of those that backward is still to make; asked: the most bytes that the user wants spent.
    """
    sizes = footprint.layer_bytes(size)
    room = room_for_layers(memory.free, memory.total, footprint.reserve(size, missing_gradients), asked)
    whole = layers_that_fit(sizes, room)
    return Split(whole, room - sum(sizes[len(sizes) - whole :]))


def missing_gradient_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Returns the bytes of the gradients that backward is still to make, of weights of any shape."""
    return sum(weight.nbytes for weight in weights if weight.requires_grad and weight.grad is None)


def working_weights(layer: torch.nn.Module, experts_per_token: int) -> int:
    """Counts the weights of a layer that a token meets: of stacked experts (E, ., .) only those that it is sent to."""
    shapes = [whole_shape(weight) for weight in layer.parameters()]
    return sum(
        shape.numel() // shape[0] * min(experts_per_token, shape[0]) if len(shape) == 3 else shape.numel()
        for shape in shapes
    )


class Meter:
    """Measures passes all of whose layers are checkpointed, until backward has gone through one of them."""

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        device: torch.device,
        memory_of: Callable[[torch.device], DeviceMemory],
    ) -> None:
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        self._device, self._memory_of = device, memory_of
        self._casts = max(_cast_bytes(layer, device.type) for layer in layers)
        self._pass = self._size = PassSize(0, 0)
        self._saved: dict[int, int] = {}
        self._start: int | None = None
        self._peak = self._missing = 0

    def start(self, size: PassSize, missing: int, memory: DeviceMemory) -> None:
        """Starts a pass; `missing`: bytes of gradients that are not there."""
        first = self._start is None
        # With several passes before a backward, all count from the one that began with least.
        self._start = memory.allocated if self._start is None else min(self._start, memory.allocated)
        self._missing = missing if first else min(self._missing, missing)
        self._pass = size

    def watched(self, layer: torch.nn.Module | None, function: Callable) -> Callable:
        """Wraps a layer's function, so that the memory is measured that its second run leaves behind."""
        if layer not in self._numbers:
            return function
        runs, size = itertools.count(), self._pass

        def run(*args: object) -> object:
            if next(runs) == 0:
                return function(*args)
            before = self._memory_of(self._device).allocated
            try:
                # Checkpointing stops the run, by an exception, when it has all that backward wants.
                return function(*args)
            finally:
                self._record(self._numbers[layer], size, before)

        return run

    def _record(self, number: int, size: PassSize, before: int) -> None:
        memory = self._memory_of(self._device)
        self._size = self._size.joined(size)
        # A layer that runs several times saves as often.
        self._saved[number] = self._saved.get(number, 0) + max(0, memory.allocated - before)
        # Where something before the pass took more than the pass, that is what is known: too much.
        self._peak = memory.peak - (self._start or 0)

    def footprint(self) -> Footprint | None:
        """Returns the footprint; None as long as there was no backward. A layer without one counts as the largest."""
        if not self._saved:
            return None
        largest = max(self._saved.values())
        rates = (self._saved.get(number, largest) / self._size.tokens for number in range(len(self._numbers)))
        return Footprint(self._size, tuple(rates), self._casts, self._peak, self._missing)


def _cast_bytes(layer: torch.nn.Module, device_type: str) -> int:
    """Returns the bytes of the copies that autocast makes of a layer's float32 weights."""
    if not torch.is_autocast_enabled(device_type):
        return 0
    itemsize = torch.get_autocast_dtype(device_type).itemsize
    return sum(whole_size(weight) * itemsize for weight in layer.parameters() if weight.dtype == torch.float32)
