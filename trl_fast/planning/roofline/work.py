"""Counts a step's work on fake tensors, by the stages of the step: operations, bytes, launches, copies to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from ..gpu_facts import Gpu
from .bytes_moved import FREE, by_name, extent, name_of, touched
from .flops import flops_of
from .launches import Launch

# What the host takes for a launch of eager PyTorch: the mean of seven steps of a 0.5B model (30 to 59 microseconds),
# in which an H200 was busy for 36 to 81% of the time (docs/gpu-h200.md). A step cannot be faster.
HOST_SECONDS = 44e-6


@dataclass(frozen=True)
class Work:
    """Holds what a piece of a step comes to.

    - `narrow_flops`, `float32_flops`: operations of products, by the width of their numbers; those of attention, which
      do not grow as the length does, are `attention_flops` and no part of these.
    - `moved`: bytes read and written; a product's factors that were there before it, such as weights, are not counted.
    - `launches`: kernels; `host_bytes`: copied to the host's memory or from there.
    - `link_bytes`, `network_bytes`: what a rank sends to others of its machine, or to all where there are several
      machines, while it computes; `awaited_bytes`: what it sends within its machine and waits for.
    """

    narrow_flops: float = 0.0
    float32_flops: float = 0.0
    attention_flops: float = 0.0
    moved: float = 0.0
    launches: float = 0.0
    host_bytes: float = 0.0
    link_bytes: float = 0.0
    network_bytes: float = 0.0
    awaited_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return self.mixed(other, 1.0, 1.0)

    def times(self, factor: float) -> Work:
        """Returns so many times the work."""
        return self.mixed(self, factor, 0.0)

    def mixed(self, other: Work, own: float, others: float) -> Work:
        """Returns own · this + others · the other."""
        names = (item.name for item in fields(self))
        return Work(*(own * getattr(self, name) + others * getattr(other, name) for name in names))

    def seconds(self, gpu: Gpu) -> float:
        """Estimates the time: products and bytes one after the other; at least the host's, its copies' and the wire's.

        What goes over the wire hides behind the GPU's work, but for what the GPU waits for.
        """
        return max(self.bounds(gpu).values())

    def bounds(self, gpu: Gpu) -> dict[str, float]:
        """Returns the seconds that the step takes at least, by what makes it take so long."""
        flops = self.narrow_flops + self.attention_flops
        return {
            "the GPU": gpu.milliseconds(flops, self.float32_flops, self.moved) / 1e3
            + self.awaited_bytes / gpu.link_bytes_per_second,
            "launches": self.launches * HOST_SECONDS,
            "copies to the host": self.host_bytes / gpu.host_bytes_per_second,
            "the wire": self.link_bytes / gpu.link_bytes_per_second
            + self.network_bytes / gpu.network_bytes_per_second,
        }


class WorkCounter:
    """Adds up the work of each stage.

    stage: tells the present one; was_there: whether a tensor was there before the step; reads_images: whether it is
    images that are read now, whose work does not grow with the text; attention_only: whether all but the operations of
    attention is left out.
    """

    def __init__(
        self,
        stage: Callable[[], str | None],
        was_there: Callable[[torch.Tensor], bool],
        reads_images: Callable[[], bool] = lambda: False,
        *,
        attention_only: bool = False,
    ) -> None:
        self._stage, self._was_there, self._attention_only = stage, was_there, attention_only
        self._reads_images = reads_images
        self.by_stage: dict[str, Work] = {}
        self.of_images: dict[str, Work] = {}

    def add(self, work: Work) -> None:
        """Adds work to the present stage; none before the first one."""
        stage = self._stage()
        if self._attention_only:
            work = Work(attention_flops=work.attention_flops)
        if stage is not None:
            found = self.of_images if self._reads_images() else self.by_stage
            found[stage] = found.get(stage, Work()) + work

    def launch(self, launch: Launch) -> None:
        """Adds a launch of a kernel that is no operator."""
        brought = extent([factor for factor in launch.factors if self._was_there(factor)])
        moved = extent([*launch.read, *launch.factors]) + extent([*launch.written]) - brought
        self.add(Work(moved=moved, launches=1, narrow_flops=launch.flops))

    def observe(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict, out: Any) -> None:
        """Adds one operator, its arguments and its result."""
        is_attention = "attention" in name_of(func)
        if self._stage() is None or name_of(func) in FREE or (self._attention_only and not is_attention):
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        given = by_name(func, args, kwargs)
        read, written = touched(func, given, tensors, results)
        if not (read or written):
            return
        done = flops_of(func, given)
        brought = extent([factor for factor in done.factors if self._was_there(factor)])
        flops = {
            "attention_flops" if is_attention else "float32_flops" if done.float32 else "narrow_flops": done.flops
        }
        self.add(Work(moved=read + written - brought, launches=1, **flops))
