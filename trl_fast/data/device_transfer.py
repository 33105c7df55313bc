"""Copies tensors from the CPU's memory to a GPU's without making the host wait."""

from __future__ import annotations

import torch


def copy_to_device(tensor: torch.Tensor, device: torch.device | str, *, non_blocking: bool = False) -> torch.Tensor:
    """Returns the tensor (any shape and dtype) on `device`; from the CPU to a GPU the host does not wait.

    A GPU fetches by itself from pinned memory only, so a tensor that is not pinned is copied there first. torch keeps
    that memory until the copy is done; the tensor must not be changed meanwhile.

    non_blocking: as in Tensor.to, for copies between other devices, where only the caller knows whether it is safe.
    """
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device, non_blocking=non_blocking)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)
