"""Chooses ops whose backward passes are in C++, torch.ops.trl_fast.eager_*, for who calls them one by one.

A call of an op in Python takes 2.6 to 4.7 times the host's time (benchmarks.host_time). Those are for what no C++ or
CUDA kernel serves, and for who looks at ops as wholes: compilers, simulations, and functional transforms, which they
refuse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .backends import choose_backend, forced_backend, load_extension
from .device import device_facts, simulated

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def eager_op(op: str, x: torch.Tensor, backend: str | None, name: str | None = None) -> Callable[..., Any] | None:
    """Returns the extension's op whose backward pass is in C++, too; None where it is Python's.

    x: of any shape; backend: that is forced, or None; name: of what is computed with the kernels of `op`, if it is
    another.

    Raises:
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    return None if _is_looked_at(x) else _eager_op(op, name or op, backend, forced_backend(), x.device, x.dtype)


@functools.cache
def _eager_op(
    op: str, name: str, backend: str | None, _forced: str | None, device: torch.device, dtype: torch.dtype
) -> Callable[..., Any] | None:
    """Returns what `eager_op` does, settled once: asking for each call would take longer than a call."""
    has_one = choose_backend(op, backend, device_facts(device), dtype) in ("cuda", "cpp")
    return getattr(torch.ops.trl_fast, f"eager_{name}").default if has_one else None


def eager_linear(op: str, x: torch.Tensor) -> Callable[..., Any] | None:
    """Returns "joint_linear" or "lora_linear" by ATen's products and with a backward pass in C++, as `eager_op` does.

    x: (..., H), what the layers read. None: where products of x, or of autocast's dtype, are not ATen's or have
    another dtype (ops/matmul.py), and where `eager_op` returns None.
    """
    if _is_looked_at(x):
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _eager_linear(op, forced_backend(), x.device, dtype)


@functools.cache
def _eager_linear(op: str, forced: str | None, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    facts = device_facts(device)
    is_atens = not facts.own_products and facts.product_dtypes.get(dtype, dtype) == dtype
    serves = is_atens and forced != "torch" and load_extension().ok
    return getattr(torch.ops.trl_fast, f"eager_{op}").default if serves else None


def _is_looked_at(x: torch.Tensor) -> bool:
    """Tells whether a compiler, a simulation or a transform looks at ops on x, of any shape, as wholes."""
    transforms = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return transforms or type(x) not in _PLAIN or x.device.type in simulated.facts
