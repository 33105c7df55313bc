"""Streams that run nothing, and who looks whether the work on them is in order.

Work is done at once, in the order in which it is queued. Vector clocks tell what would be sure of two streams: an
access comes after another if its stream has waited, by events, for something at or after it. Two accesses to the same
memory of which one writes have to be in order; so have all accesses and the memory's end, after which its own stream
may use it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Event = dict[object, int]


class Stream:
    """Knows how much of each stream's work comes before what is queued next."""

    def __init__(self, _device: object = None) -> None:
        self.clock: Event = {self: 0}

    def record_event(self) -> Event:
        return dict(self.clock)

    def wait_event(self, event: Event) -> None:
        for stream, count in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Streams:
    """Stands for `torch.cuda` and its streams; `current` is the one that computes, at first."""

    Stream = Stream

    def __init__(self) -> None:
        self.current = Stream()

    def current_stream(self, _device: object = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@dataclass
class _Memory:
    owner: Stream
    shape: torch.Size
    written: tuple[Stream, int] | None = None
    read: dict[Stream, int] = field(default_factory=dict)
    noted: list[Stream] = field(default_factory=list)


class Races(TorchDispatchMode):
    """Notes in `found` every access that is not in order; memory belongs to the stream that it was made on."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.found: list[str] = []
        self._streams = streams
        self._memories: dict[int, _Memory] = {}

    def note(self, tensor: torch.Tensor, stream: Stream) -> None:
        """As `Tensor.record_stream`: the memory's end waits for the stream."""
        self._memory(tensor).noted.append(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(out)
        there = {tensor.untyped_storage()._cdata for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in there]
        written = [*new, *_written(func, args, kwargs)]
        if made and not written:
            return out  # A view.
        stream = self._streams.current
        stream.clock[stream] += 1
        for tensor in given:
            self._access(tensor, stream, func, writes=False)
        for tensor in written:
            self._access(tensor, stream, func, writes=True)
        return out

    def _memory(self, tensor: torch.Tensor) -> _Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            self._memories[key] = _Memory(self._streams.current, tensor.shape)
            weakref.finalize(storage, self._end, key)
        return self._memories[key]

    def _access(self, tensor: torch.Tensor, stream: Stream, func: Any, *, writes: bool) -> None:
        memory = self._memory(tensor)
        others = [memory.written] if memory.written is not None else []
        if writes:
            others += memory.read.items()
        if any(stream.clock.get(other, 0) < count for other, count in others):
            self.found.append(f"{func} {'writes' if writes else 'reads'} {tuple(memory.shape)} too early")
        if writes:
            memory.written, memory.read = (stream, stream.clock[stream]), {}
        else:
            memory.read[stream] = stream.clock[stream]

    def _end(self, key: int) -> None:
        memory = self._memories.pop(key)
        for stream, count in [*filter(None, [memory.written]), *memory.read.items()]:
            if memory.owner.clock.get(stream, 0) < count and stream not in memory.noted:
                self.found.append(f"{tuple(memory.shape)} is freed too early")


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operator changes."""
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            found += _tensors(args[number] if number < len(args) else kwargs.get(argument.name))
    return found
