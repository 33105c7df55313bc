"""Allocates large tensors (weights' gradients, tiles, kept logits) from the memory pool of the extension."""

from __future__ import annotations

import math

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from trl_fast.kernels.shared_constants import POOLED_FROM_BYTES

from .backends import load_extension
from .device import device_facts
from .gradient_scale import scale_in_place


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns an uninitialised tensor of `shape`, `dtype` and `device`.

    On the CPU, a large tensor comes from the memory pool (csrc/cpu/memory_pool.h), and a small one is filled with
    zeros: a matrix product that writes to fresh pages would wait for each of them.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if _is_pooled(shape, dtype, device):
        return torch.ops.trl_fast.pooled_empty(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def reused_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns an uninitialised tensor, from the pool where `pooled_empty` takes it from there."""
    if device.type == "cpu" and _is_pooled(shape, dtype, device):
        return torch.ops.trl_fast.pooled_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _is_pooled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    large = math.prod(shape) * dtype.itemsize >= POOLED_FROM_BYTES
    return large and device_facts(device).kind == "cpu" and load_extension().ok


def _graph_is_retained() -> bool:
    """Returns whether the running backward pass keeps its graph (`retain_graph`, `create_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def as_dtype(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns `gradient` (any shape, floating point) in `dtype`, in memory of the pool where it has to be copied."""
    if gradient.dtype == dtype:
        return gradient
    return pooled_empty(gradient.shape, dtype, gradient.device).copy_(gradient)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns gradient * factor in `dtype`, for a backward pass. gradient: any shape, floating point; factor: 0-d.

    The product is written over `gradient` if no later backward pass needs that and no compiler traces this one;
    otherwise into memory of the pool.
    """
    traced = torch.compiler.is_compiling() or isinstance(gradient, FunctionalTensor)
    if gradient.dtype == dtype and not traced and not _graph_is_retained():
        return scale_in_place(gradient, factor)
    out = pooled_empty(gradient.shape, dtype, gradient.device)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)
