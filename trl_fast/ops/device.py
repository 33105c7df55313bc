"""Tells the facts about a device that decide how code runs on it: torch's, or those of a device that is not there.

Every choice that depends on the device (tiles of the head, dtypes of products, attention kernels, what checkpointing
leaves alone, offloading) asks `device_facts`. A simulation gives other facts with `simulated_device`: code on fake
tensors, which are on the CPU, then goes the way that it goes on a GPU. Nothing else has to be exchanged.

A simulation counts in the thread that began it, so a planner may run beside a training. Autograd computes gradients of
CPU tensors in the thread that asks for them; those of tensors on a GPU in threads of its own, where the real facts
count.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_fast.kernels.launching import stand_ins

# 1 or 0: whether float32 matrices are multiplied by our kernels, whatever the CPU.
OWN_PRODUCTS = "TRL_FAST_OWN_PRODUCTS"


@dataclass(frozen=True)
class DeviceMemory:
    """Holds a device's memory in bytes; peak: the most that tensors ever took.

    free: what tensors can still take, in the device or in what the allocator holds unused.
    """

    free: int
    total: int
    allocated: int
    peak: int


@dataclass(frozen=True, eq=False)
class DeviceFacts:
    """Holds what code needs to know about a device.

    - `kind`: a torch device type: "cpu", "cuda", ...
    - `multiplies_bf16`: whether products of bfloat16 numbers are fast there.
    - `capability`: a CUDA device's compute capability, (0, 0) for others.
    - `read_memory`: the memory now; None where it is not known, or where others live in it too.
    - `own_products`: whether our kernels multiply float32 matrices faster than ATen's library does (ops/matmul.py).

    What follows is for devices that are not there; the defaults are those of devices that are:

    - `serves`: whether a backend's kernels of an op are there, by their names; None: as `backends.supports` finds.
      What kernels take (ops, dtypes) is asked before.
    - `launches`: stands in for the launchers of Triton's kernels: given the launcher and what the launcher was given.
    - `row_kernels`, `sparse_kernels`, `divergence_kernel`: stand in for those of every backend (`RowKernels`,
      `SparseKernels`, `DivergenceKernel`).
    - `pinned_copies`: stands in for `modeling.pinned_copies.copies_of`.
    - `flex_attention`: stands in for FlexAttention's kernels (`modeling.attention.flex`): given query, key, value and
      how many pairs of tokens see each other, returns output and log-sum-exp.
    - `holds`: whether a tensor is in the device's memory; None: whether its device is of this kind.
    - `first_tiles_only`: of tiles that are alike, the first two and the last are computed, which takes the memory of
      all.
    """

    kind: str
    multiplies_bf16: bool
    capability: tuple[int, int] = (0, 0)
    read_memory: Callable[[], DeviceMemory | None] = lambda: None
    own_products: bool = False
    serves: Callable[[str, str], bool] | None = None
    launches: Callable[..., None] | None = None
    row_kernels: Any = None
    sparse_kernels: Any = None
    divergence_kernel: Any = None
    pinned_copies: Callable[[torch.device], Any] | None = None
    flex_attention: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    holds: Callable[[torch.Tensor], bool] | None = None
    first_tiles_only: bool = False

    @functools.cached_property
    def product_dtypes(self) -> dict[torch.dtype, torch.dtype]:
        """Returns the dtypes whose numbers are multiplied in another dtype, and which that is.

        A CPU without 16-bit products (AMX or AVX512-BF16) takes seven to a hundred times as long for them as for those
        of the same numbers in float32.
        """
        if self.kind != "cpu":
            return {}
        bf16 = {} if self.multiplies_bf16 else {torch.bfloat16: torch.float32}
        return {torch.float16: torch.float32, **bf16}

    @property
    def is_cuda(self) -> bool:
        """Tells whether this is a CUDA device."""
        return self.kind == "cuda"


class _Simulated(threading.local):
    """Holds the facts of this thread's simulated devices, by the type of the device that their tensors are on."""

    def __init__(self) -> None:
        self.facts: dict[str, DeviceFacts] = {}


simulated = _Simulated()


def device_facts(device: torch.device) -> DeviceFacts:
    """Returns the facts of a device: those of a simulation if one runs on such a device, else torch's."""
    return simulated.facts.get(device.type) or real_facts(device)


@contextmanager
def simulated_device(facts: DeviceFacts, on: str = "cpu") -> Iterator[None]:
    """Lets tensors on devices of the type `on` count as being on a device with these facts, within, in this thread."""
    before, stand_ins_before = simulated.facts, stand_ins.by_device
    simulated.facts = {**before, on: facts}
    others = {kind: run for kind, run in stand_ins_before.items() if kind != on}
    stand_ins.by_device = others if facts.launches is None else {**others, on: facts.launches}
    try:
        yield
    finally:
        simulated.facts, stand_ins.by_device = before, stand_ins_before


def has_gpu() -> bool:
    """Returns whether there is a CUDA device, or a simulation of one in this thread."""
    return any(facts.is_cuda for facts in simulated.facts.values()) or torch.cuda.is_available()


# A table: torch.compile looks past functools.cache, and breaks the graph where the CPU is asked.
known_facts: dict[torch.device, DeviceFacts] = {}


def real_facts(device: torch.device) -> DeviceFacts:
    """Returns torch's facts of a device, whatever is simulated."""
    facts = known_facts.get(device)
    if facts is None:
        facts = known_facts[device] = _ask(device)
    return facts


def _ask(device: torch.device) -> DeviceFacts:
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)
        return DeviceFacts("cuda", True, capability, functools.partial(_cuda_memory, device))
    if device.type == "cpu":
        multiplies_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return DeviceFacts("cpu", multiplies_bf16, own_products=_has_own_products())
    return DeviceFacts(device.type, True)


def _has_own_products() -> bool:
    """Returns whether our products are faster: with AVX-512 or AVX2, but not on Intel's CPUs.

    There ATen calls Intel's library, MKL, which takes kernels of AVX2 on other CPUs. TRL_FAST_OWN_PRODUCTS decides
    otherwise.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    forced = os.environ.get(OWN_PRODUCTS, "")
    if forced not in ("", "0", "1"):
        raise ValueError(f"{OWN_PRODUCTS}={forced}: expected 0 or 1")
    if forced:
        return forced == "1"
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not _is_intel()


def _is_intel() -> bool:
    cpus = Path("/proc/cpuinfo")
    return "GenuineIntel" in platform.processor() + (cpus.read_text() if cpus.exists() else "")


def _cuda_memory(device: torch.device) -> DeviceMemory:
    stats = torch.cuda.memory_stats(device)
    allocated, reserved = stats["allocated_bytes.all.current"], stats["reserved_bytes.all.current"]
    free, total = torch.cuda.mem_get_info(device)
    total = int(total * torch.cuda.get_per_process_memory_fraction(device))
    free = min(free, total - reserved) + reserved - allocated
    return DeviceMemory(free, total, allocated, stats["allocated_bytes.all.peak"])


def some_tiles(tiles: Iterator[slice], device: torch.device) -> Iterator[slice]:
    """Yields the tiles that are to be computed: all of them, but in a simulation the first two and the last."""
    if not device_facts(device).first_tiles_only:
        yield from tiles
        return
    every = list(tiles)
    yield from (*every[:2], *every[2:][-1:])
