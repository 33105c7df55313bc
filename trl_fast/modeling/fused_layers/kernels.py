"""Tells whether kernels serve the ops of layers."""

from __future__ import annotations

import os

import torch

from trl_fast.ops.backends import ENVIRONMENT_VARIABLE, Support, choose_backend, supports
from trl_fast.ops.device import device_facts


def kernel_for(op: str, device: torch.device, dtype: torch.dtype) -> Support:
    """Tells whether a kernel serves an op, rather than PyTorch's own code, and why not."""
    try:
        backend = choose_backend(op, None, device_facts(device), dtype)
    except RuntimeError as error:
        return Support(False, str(error))
    if backend != "torch":
        return Support(True, backend)
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return Support(False, f"{ENVIRONMENT_VARIABLE}=torch")
    return supports(op, "cpp" if device.type == "cpu" else "triton", device, dtype)
