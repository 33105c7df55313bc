"""Finds the kernels of layers: those in C++ and CUDA are operators of torch, those in Triton functions.

What computes the same has the same name and arguments everywhere, and writes into what it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from trl_fast.kernels.shared_constants import FEWEST_WORKERS, NUMBERS_OF_WORKERS


def by_kernels(run: Callable) -> dict[str, Callable]:
    """Returns for each backend that has kernels what `run` does with that backend, its first argument."""
    return {backend: functools.partial(run, backend) for backend in ("cuda", "triton", "cpp")}


def layer_kernel(name: str, backend: str) -> Callable[..., Any]:
    """Returns the kernel of a backend: "rms_norm", "rotary", ..."""
    if backend != "triton":
        return getattr(torch.ops.trl_fast, f"layer_{name}")
    from trl_fast.kernels import layer_kernels, rotary_kernels

    return getattr(rotary_kernels if name.endswith(("rotary", "rotary_backward")) else layer_kernels, name)


def new_partials(backend: str, x: torch.Tensor, width: int, rows: int, blocks: int) -> torch.Tensor:
    """Returns room for sums of the gradient of a weight of `width` numbers, float32; they add up to the gradient.

    x: of any shape, tells the device. rows: that have a part in it, which workers share on a GPU: as many on every
    one, so that the same numbers are added in the same order. blocks: of them, whose sums a C++ kernel gives.
    """
    sums = blocks if backend == "cpp" else min(rows, max(FEWEST_WORKERS, NUMBERS_OF_WORKERS // width))
    return x.new_empty(sums, width, dtype=torch.float32)
