"""The two row kernels in Triton; `trl_fast/ops/rows.py` specifies them and explains the names.

One program works on one row (scores) or on one tile of a row (grad). Row offsets are 64-bit. Statistics are float32,
whatever the logits are. Only flags and the block size are compile-time constants: no length, temperature or scale
makes Triton compile again. The configurations are fixed, so a user's first step waits for no autotuning.
"""

import torch
import triton
import triton.language as tl

ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1 = 1, 2, 4, 8
NUM_STATISTICS = 7
# A block of 8 KiB is two 16-byte loads a thread; with twice that, the float32 scores spill on sm_80.
BLOCK_BYTES, NUM_WARPS = 8192, 8

_SCALARS = ["scale", "softcap", "inv_temperature", "column_offset"]


@triton.jit
def _transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """u and du/dz of raw logits (bias added already)."""
    y = z * scale
    slope = scale * inv_temperature
    if HAS_SOFTCAP:
        # tanh(t) = 2 sigmoid(2t) - 1
        tanh = 2.0 * tl.sigmoid(2.0 * (y / softcap)) - 1.0
        y = softcap * tanh
        slope = slope * (1.0 - tanh * tanh)
    return y * inv_temperature, slope


@triton.jit
def _load_raw(row, bias, columns, mask, HAS_BIAS: tl.constexpr):
    z = tl.load(row + columns, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=_SCALARS)
def row_scores_kernel(
    logits,
    row_stride,
    targets,
    bias,
    statistics,
    statistic_stride,
    num_columns,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's statistics in one read: an online log-sum-exp, and the other sums relative to its running maximum."""
    LOG2E: tl.constexpr = 1.4426950408889634
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * row_stride
    target = tl.load(targets + index)
    top = -float("inf")
    before = -float("inf")
    s = 0.0
    sx = 0.0
    sq = 0.0
    total = 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        z = _load_raw(row, bias, columns, mask, HAS_BIAS)
        u, _ = _transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
        u = tl.where(mask, u, -float("inf"))
        new_top = tl.maximum(top, tl.max(u, 0))
        # While everything is -inf, subtract 0: -inf - -inf would be NaN.
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        shift = tl.where(top == -float("inf"), 0.0, top - anchor)
        factor = tl.exp2(shift * LOG2E)
        x = u - anchor
        e = tl.exp2(x * LOG2E)
        if WITH_ENTROPY:
            sx = factor * (sx + shift * s) + tl.sum(tl.where(e == 0.0, 0.0, e * x), 0)
        if WITH_SQUARES:
            sq = factor * factor * sq + tl.sum(e * e, 0)
        if WITH_MEAN:
            total += tl.sum(tl.where(mask, u, 0.0), 0)
        if WITH_TOP1:
            before = tl.maximum(before, tl.max(tl.where(columns < target, u, -float("inf")), 0))
        s = factor * s + tl.sum(e, 0)
        top = new_top
    z = tl.load(row + target).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + target).to(tl.float32)
    target_logit, _ = _transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    log_s = tl.log(s)
    lse = top + log_s
    # What that addition lost, exactly (Knuth's two-sum).
    part = lse - top
    low = (top - (lse - part)) + (log_s - part)
    out = statistics + index
    tl.store(out, lse)
    tl.store(out + statistic_stride, (target_logit - top) - log_s)
    if WITH_ENTROPY:
        tl.store(out + 2 * statistic_stride, log_s - sx / s)
    if WITH_SQUARES:
        tl.store(out + 3 * statistic_stride, tl.log(sq) - 2.0 * log_s)
    if WITH_MEAN:
        tl.store(out + 4 * statistic_stride, total / num_columns)
    if WITH_TOP1:
        is_top = (target_logit >= top) & (target_logit > before)
        tl.store(out + 5 * statistic_stride, tl.where(is_top, 1.0, 0.0))
    tl.store(out + 6 * statistic_stride, tl.where(tl.abs(lse) < float("inf"), low, 0.0))


@triton.jit(do_not_specialize=_SCALARS)
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
    u, slope = _transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    x = u - tl.load(lse + index)
    p = tl.exp2(x * LOG2E)
    du = tl.where(p == 0.0, 0.0, p * (a + b * x)) + e + tl.where(columns == target, d, 0.0)
    tl.store(out + index * out_stride + columns, (du * slope).to(out.dtype.element_ty), mask=mask)


def row_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
) -> torch.Tensor:
    """Statistics (7, R) float32 of raw logits (R, V) float32|bfloat16|float16, rows strided or not; see rows.py.

    targets: (R,) int64 in [0, V); bias: (V,) or None; rows of statistics that `outputs` does not ask for are NaN.
    """
    rows, columns = logits.shape
    statistics = torch.full((NUM_STATISTICS, rows), float("nan"), dtype=torch.float32, device=logits.device)
    if rows:
        row_scores_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets,
            logits if bias is None else bias,
            statistics,
            statistics.stride(0),
            columns,
            scale,
            softcap,
            inv_temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0.0,
            WITH_ENTROPY=bool(outputs & ENTROPY),
            WITH_SQUARES=bool(outputs & LOG_SUM_SQ_PROBS),
            WITH_MEAN=bool(outputs & MEAN_LOGITS),
            WITH_TOP1=bool(outputs & IS_TOP1),
            BLOCK=BLOCK_BYTES // logits.element_size(),
            num_warps=NUM_WARPS,
        )
    return statistics


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
        targets,
        logits if bias is None else bias,
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
