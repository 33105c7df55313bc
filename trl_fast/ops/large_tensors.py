"""Large tensors in memory that is there: weights' gradients, tiles, kept logits."""

from __future__ import annotations

import math

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

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


def _graph_is_retained() -> bool:
    """Whether the backward pass at work keeps its graph (`retain_graph`, `create_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def as_dtype(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient in `dtype`, in memory that is there."""
    if gradient.dtype == dtype:
        return gradient
    return large_empty(gradient.shape, dtype, gradient.device).copy_(gradient)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor (0-d) in `dtype`: a head's gradient, for a backward pass, in memory that is there.

    It is changed in place where no other backward pass will ask for it, and no compiler traces this one.
    """
    traced = torch.compiler.is_compiling() or isinstance(gradient, FunctionalTensor)
    if gradient.dtype == dtype and not traced and not _graph_is_retained():
        return gradient.mul_(factor.to(dtype))
    out = large_empty(gradient.shape, dtype, gradient.device)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)
