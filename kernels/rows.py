"""The two row kernels in Triton; `trl_fast/ops/rows.py` specifies them and explains the names.

One program works on one row (scores) or on one tile of a row (grad). Row offsets are 64-bit. Statistics are float32,
whatever the logits are. Only flags and the block size are compile-time constants: no number of rows, temperature or
scale makes Triton compile again. What it does look at is whether addresses and widths of the logits and the bias are
multiples of 16, which 16-byte accesses need: with a vocabulary that is one, they always are. The configurations are
fixed, so a user's first step waits for no autotuning.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device
from .online import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS, add_logits, store_sums, transformed

# A block of 8 KiB is two 16-byte loads a thread; with twice that, the float32 scores spill on sm_80.
BLOCK_BYTES, NUM_WARPS = 8192, 8

# What is read one value a row, or follows from the number of rows: its alignment and its size are nobody's business.
_PER_ROW = ["targets", "state", "state_stride", "lse", "coefficients", "coefficient_stride"]
_ANY_VALUE = ["scale", "softcap", "inv_temperature", "column_offset", *_PER_ROW]


@triton.jit
def _load_raw(row, bias, columns, mask, HAS_BIAS: tl.constexpr):
    z = tl.load(row + columns, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=_ANY_VALUE)
def row_scores_kernel(
    logits,
    row_stride,
    targets,
    bias,
    state,
    state_stride,
    num_columns,
    column_offset,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds one row of a tile to its state in one read; the state's rows are those of `trl_fast.ops.rows`."""
    index = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = logits + index * row_stride
    target = tl.load(targets + index) - column_offset
    state += index
    nothing = tl.zeros([1], tl.float32)
    top = tl.load(state).to(tl.float32)
    s = tl.load(state + state_stride).to(tl.float32)
    sum_x, sum_sq, total, before = nothing, nothing, nothing, nothing
    if ENTROPY & OUTPUTS:
        sum_x = tl.load(state + 2 * state_stride).to(tl.float32)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        sum_sq = tl.load(state + 3 * state_stride).to(tl.float32)
    if MEAN_LOGITS & OUTPUTS:
        total = tl.load(state + 4 * state_stride).to(tl.float32)
    if IS_TOP1 & OUTPUTS:
        before = tl.load(state + 6 * state_stride).to(tl.float32)
    sums = (top, s, sum_x, sum_sq, total, before)
    for start in range(0, num_columns, BLOCK):
        columns = (start + tl.arange(0, BLOCK))[None, :]
        mask = columns < num_columns
        z = _load_raw(row[:, None], bias, columns, mask, HAS_BIAS)
        u, _ = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
        u = tl.where(mask, u, -float("inf"))
        sums = add_logits(sums, u, mask, columns < target[:, None], OUTPUTS)
    store_sums(state, state_stride, sums, None, OUTPUTS)
    here = (target >= 0) & (target < num_columns)
    z = _load_raw(row, bias, target, here, HAS_BIAS)
    target_logit, _ = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    tl.store(state + 5 * state_stride, target_logit, mask=here)


@triton.jit(do_not_specialize=_ANY_VALUE)
def row_grad_kernel(
    logits,
    row_stride,
    targets,
    bias,
    lse,
    coefficients,
    coefficient_stride,
    out,
    out_stride,
    num_columns,
    column_offset,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one tile of a row; each element depends on itself only, so `out` may be `logits`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    target = tl.load(targets + index) - column_offset
    a = tl.load(coefficients + index)
    b = tl.load(coefficients + index + coefficient_stride)
    d = tl.load(coefficients + index + 2 * coefficient_stride)
    e = tl.load(coefficients + index + 3 * coefficient_stride)
    z = _load_raw(logits + index * row_stride, bias, columns, mask, HAS_BIAS)
    u, slope = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    x = u - tl.load(lse + index)
    p = tl.exp2(x * LOG2E)
    du = tl.where(p == 0.0, 0.0, p * (a + b * x)) + e + tl.where(columns == target, d, 0.0)
    tl.store(out + index * out_stride + columns, (du * slope).to(out.dtype.element_ty), mask=mask)


@on_tensors_device
def row_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
) -> None:
    """Adds a tile of raw logits (R, C) float32|bfloat16|float16, rows strided or not, to `state` (7, R) float64.

    targets: (R,) int64, columns of the full vocabulary; bias: (C,) or None; see rows.py.
    """
    rows, columns = logits.shape
    if rows == 0 or columns == 0:
        return
    row_scores_kernel[(rows,)](
        logits,
        logits.stride(0),
        targets.contiguous(),
        logits if bias is None else bias.contiguous(),
        state,
        state.stride(0),
        columns,
        column_offset,
        scale,
        softcap,
        inv_temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        OUTPUTS=outputs,
        BLOCK=BLOCK_BYTES // logits.element_size(),
        num_warps=NUM_WARPS,
    )


@on_tensors_device
def row_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    column_offset: int,
    out: torch.Tensor,
) -> None:
    """Writes the gradient of raw logits (R, C) to `out` (R, C), which may be the same memory; see rows.py.

    lse: (R,) float32; coefficients: (4, R) float32; logits are columns [column_offset, column_offset + C).
    """
    rows, columns = logits.shape
    if rows == 0 or columns == 0:
        return
    block = BLOCK_BYTES // logits.element_size()
    row_grad_kernel[(rows, triton.cdiv(columns, block))](
        logits,
        logits.stride(0),
        targets.contiguous(),
        logits if bias is None else bias.contiguous(),
        lse.contiguous(),
        coefficients,
        coefficients.stride(0),
        out,
        out.stride(0),
        columns,
        column_offset,
        scale,
        softcap,
        inv_temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
