"""Multiplies a gradient in place by a number on the GPU in Triton; `trl_fast/ops/gradient_scale.py` says why.

Each program looks at the number first: where it is 1, as for a loss that is no part of another, nothing else is read.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device

# Elements of one trip of a program: thirty-two a thread, four 16-byte accesses of a 16-bit type.
BLOCK, NUM_WARPS = 8192, 8
MOST_PROGRAMS = 1024


@triton.jit(do_not_specialize=["factor"])
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """Multiplies `count` numbers that lie together."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < count
            x = tl.load(gradient + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(gradient + offsets, (x * by).to(gradient.dtype.element_ty), mask=mask)


@on_tensors_device
def scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a contiguous gradient, any shape, float32|bfloat16|float16, by `factor`, 0-d of its dtype."""
    count = gradient.numel()
    programs = min(triton.cdiv(count, BLOCK), MOST_PROGRAMS)
    if programs:
        scale_kernel[(programs,)](gradient, factor, count, BLOCK=BLOCK, num_warps=NUM_WARPS)
