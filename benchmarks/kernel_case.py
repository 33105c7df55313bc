"""Describes a Triton kernel that is compiled without being run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction

from .gpu_machine_code import TARGETS


@dataclass(frozen=True)
class KernelCase:
    """Holds a kernel with the types of its arguments (Triton's spelling) and its compile-time constants."""

    label: str
    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    # Loads of single values, such as a row's target, which cannot be wide; None for a kernel that streams in a loop.
    scalar_loads: int | None
    # Of global memory, that a thread has to move for its share of a tile.
    least_bytes: int = 0
    # What it loads of values that programs share, such as a weight, and that the cache has.
    cached_bytes: int = 0
    targets: tuple[int, ...] = TARGETS
    # None: the compiler's default.
    num_stages: int | None = None
    max_registers: int | None = None
    # Whether a product and the sum behind it become one instruction, with one rounding.
    fuses_products: bool = True
