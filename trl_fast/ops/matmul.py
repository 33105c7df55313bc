"""Multiplies matrices, with results that may be wider than the factors.

A GPU accumulates products of 16-bit numbers in float32 and can hand the sums over as they are; a CPU rounds them
first.

Products that a CPU computes in float32 are those of our kernels (csrc/cpu/product_kernels.h) where these are faster
than ATen's library. They widen 16-bit factors as they pack them, and the bits of a result do not depend on how many
rows and columns it is computed with, nor on the number of threads.
"""

from __future__ import annotations

import torch

from .backends import load_extension
from .device import device_facts, known_facts, real_facts, simulated
from .memory_pool import reused_empty

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_OWN_DTYPES = (torch.float32, *SIXTEEN_BITS)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype in which products of numbers of `dtype` are computed on a device."""
    return device_facts(device).product_dtypes.get(dtype, dtype)


def gemm_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which products with `tensor`, of any shape, are computed on its device."""
    return product_dtype(tensor.dtype, tensor.device)


def own_product_serves(out: torch.Tensor, *factors: torch.Tensor) -> bool:
    """Tells whether our kernels compute out (R, C) = (R, H) @ (H, C), given the factors: on a CPU, in float32."""
    # That is device_facts, which is not called for every product.
    facts = simulated.facts.get(out.device.type) or known_facts.get(out.device) or real_facts(out.device)
    if not facts.own_products or out.dtype not in _OWN_DTYPES or 1 not in out.stride() or not load_extension().ok:
        return False
    return all(facts.product_dtypes.get(factor.dtype, factor.dtype) == torch.float32 for factor in factors)


def mm_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Computes out = left @ right, (R, C) = (R, H) @ (H, C); out may be wider than the factors."""
    if own_product_serves(out, left, right):
        torch.ops.trl_fast.product(left, right, out, False)
        return out
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if device_facts(out.device).is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(left, right))


def add_mm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Computes total += left @ right, (R, C) += (R, H) @ (H, C); total may be wider than the factors."""
    if own_product_serves(total, left, right):
        torch.ops.trl_fast.product(left, right, total, True)
    elif total.dtype == left.dtype:
        total.addmm_(left, right)
    elif device_facts(total.device).is_cuda:
        # Inside the product: a sum of its own would be read and written once more.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif total.dtype == torch.float32 and left.dtype in SIXTEEN_BITS and total.stride(-1) == 1 and load_extension().ok:
        # PyTorch widens a sum's 16-bit terms into fresh memory first.
        torch.ops.trl_fast.add_widened(torch.mm(left, right), total)
    else:
        total.add_(torch.mm(left, right))


def new_product(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns left @ right + bias, (R, C), in memory of the pool where that is large."""
    out = reused_empty((left.shape[0], right.shape[1]), left.dtype, left.device)
    dtype = product_dtype(left.dtype, left.device)
    if own_product_serves(out, left, right):
        if bias is None:
            return mm_into(out, left, right)
        add_mm(out.copy_(bias), left, right)
        return out
    if dtype == left.dtype:
        return mm_into(out, left, right) if bias is None else torch.addmm(bias, left, right, out=out)
    upcast = torch.mm(left.to(dtype), right.to(dtype))
    return out.copy_(upcast if bias is None else upcast.add_(bias))


def as_autocast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of any shape as autocast hands it to a product: numbers of 16 and 32 bits in its dtype."""
    return tensor.to(dtype) if tensor.dtype in _OWN_DTYPES else tensor
