"""Finds the kernels of layers: those in C++ and CUDA are operators of torch, those in Triton functions.

What computes the same has the same name and arguments everywhere, and writes into what it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..backends import choose_backend, forced_backend, load_extension
from ..device import device_facts, simulated

# Sums of a weight's gradient on a GPU, in float32: each worker, of which there are enough to fill one, leaves a row.
_FEWEST_WORKERS, _NUMBERS_OF_WORKERS = 256, 2**20
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def by_kernels(run: Callable) -> dict[str, Callable]:
    """Returns for each backend that has kernels what `run` does with that backend, its first argument."""
    return {backend: functools.partial(run, backend) for backend in ("cuda", "triton", "cpp")}


def layer_kernel(name: str, backend: str) -> Callable[..., Any]:
    """Returns the kernel of a backend: "rms_norm", "rotary", ..."""
    if backend != "triton":
        return getattr(torch.ops.trl_fast, f"layer_{name}")
    from trl_fast.kernels import layer_kernels, rotary_kernels

    return getattr(rotary_kernels if name.endswith(("rotary", "rotary_backward")) else layer_kernels, name)


def eager_op(op: str, x: torch.Tensor, backend: str | None, name: str | None = None) -> Callable[..., Any] | None:
    """Returns the extension's op whose backward pass is in C++, too (csrc/layer_autograd.cpp); None for Python's.

    A call of Python's ops takes some three times the host's time (benchmarks.host_time). They are for what no C++ or
    CUDA kernel serves, and for who looks at ops as wholes: compilers, simulations, and functional transforms, which
    they refuse. x: of any shape; backend: that is forced, or None; name: of what is computed with the kernels of `op`,
    if it is another.

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


def new_partials(backend: str, x: torch.Tensor, width: int, rows: int, blocks: int) -> torch.Tensor:
    """Returns room for sums of the gradient of a weight of `width` numbers, float32; they add up to the gradient.

    x: of any shape, tells the device. rows: that have a part in it, which workers share on a GPU: as many on every
    one, so that the same numbers are added in the same order. blocks: of them, whose sums a C++ kernel gives.
    """
    sums = blocks if backend == "cpp" else min(rows, max(_FEWEST_WORKERS, _NUMBERS_OF_WORKERS // width))
    return x.new_empty(sums, width, dtype=torch.float32)
