"""Makes copies between a GPU's memory and pinned memory of the CPU, on a stream beside the one that computes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Blocks of pinned memory hold a power of two bytes, so that they serve tensors of any length again; larger tensors
# take several of this size, or rounding up would nearly double them.
_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class PinnedCopy:
    """Holds a tensor's elements in the order of its memory, its shape in that order, and the way back."""

    blocks: list[torch.Tensor]
    shape: torch.Size
    dtype: torch.dtype
    inverse: tuple[int, ...]


class PinnedCopies:
    """Copies tensors from a GPU and back, in the order in which that is asked for; the host waits for none of it.

    A copy begins when what has been queued for computing before it is done. What computes waits only for events. All
    copies of a device are on one stream, so a block of pinned memory may be used again as soon as nobody asks for
    what it held: a copy into it comes after those out of it.

    streams: what has the streams, as torch.cuda does.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda) -> None:
        self._device = device
        self._streams = streams
        self._side = streams.Stream(device)
        self._blocks: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Queues work on the side stream within the context, behind what computes so far."""
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            yield

    def to_host(self, tensor: torch.Tensor) -> PinnedCopy:
        """Returns a copy in pinned memory, on its way; the tensor (any shape) has to stay as it is until then."""
        # In the order of its memory a tensor without gaps is one run of elements, which needs no copy on the device.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        inverse = tuple(sorted(range(tensor.dim()), key=order.__getitem__))
        blocks = []
        with self._beside():
            ordered = tensor.permute(order)
            for part in ordered.reshape(-1).split(_BLOCK_BYTES // tensor.element_size()):
                blocks.append(self._block(part.nbytes))
                _elements(blocks[-1], part).copy_(part, non_blocking=True)
        return PinnedCopy(blocks, ordered.shape, tensor.dtype, inverse)

    def to_device(self, copy: PinnedCopy) -> torch.Tensor:
        """Returns the tensor on the device, in the strides that it had, on its way."""
        # Of the memory of the stream that computes: what is there is done with when the copy begins.
        flat = torch.empty(copy.shape.numel(), dtype=copy.dtype, device=self._device)
        with self._beside():
            for part, block in zip(flat.split(_BLOCK_BYTES // flat.element_size()), copy.blocks, strict=True):
                part.copy_(_elements(block, part), non_blocking=True)
        return flat.view(copy.shape).permute(copy.inverse)

    def event(self) -> Any:
        """Stands for all copies asked for so far."""
        return self._side.record_event()

    def wait(self, event: Any) -> None:
        """Lets what is queued for computing from now on begin after the copies that an event stands for."""
        self._streams.current_stream(self._device).wait_event(event)

    def abandon(self, tensor: torch.Tensor) -> None:
        """Lets the memory of a tensor (any shape) that came back, and that nobody has waited for, outlive its copy."""
        tensor.record_stream(self._side)

    def forget(self, copy: PinnedCopy) -> None:
        """Lets go of a copy that nobody asks for any more: its pinned memory is used again."""
        for block in copy.blocks:
            self._blocks[len(block)].append(block)

    def _block(self, size: int) -> torch.Tensor:
        """Returns a block of pinned memory of at least `size` bytes."""
        size = 1 << (size - 1).bit_length()
        free = self._blocks[size]
        return free.pop() if free else pinned_memory(size)


def _elements(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns as many elements (N,) of a block (size,) as `like` (N,) has, in its dtype."""
    return block[: like.nbytes].view(like.dtype)


def pinned_memory(size: int) -> torch.Tensor:
    """Returns bytes (size,) that a GPU can copy to and from without the host's help."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@functools.cache
def copies_of(device: torch.device) -> PinnedCopies:
    """Returns a device's copies: one stream and one store of pinned memory for all models."""
    return PinnedCopies(device)
