"""Large tensors in memory that is there: weights' gradients, tiles, kept logits."""

from __future__ import annotations

import math

import torch

from .backends import load_extension

# Held memory comes in huge pages of 2 MiB.
_HELD_FROM_BYTES = 8 << 20


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor whose memory is there. A CPU product that writes to fresh pages waits for each page.

    On the CPU, what is large comes from memory that the extension holds between calls (csrc/cpu/held_memory.h).
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if math.prod(shape) * dtype.itemsize >= _HELD_FROM_BYTES and load_extension().ok:
        return torch.ops.trl_fast.held_empty(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def as_dtype(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient in `dtype`, in memory that is there."""
    if gradient.dtype == dtype:
        return gradient
    return large_empty(gradient.shape, dtype, gradient.device).copy_(gradient)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor (0-d) in `dtype`: a head's gradient in memory that is there."""
    out = large_empty(gradient.shape, dtype, gradient.device)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)
