"""Computes row scores and row gradients in Triton, each in a form for packed logits too.

`trl_fast/ops/head/row_kernels.py` specifies them and explains the names,
`trl_fast/ops/head/kept_logits.py` how logits are packed.

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
from .online_softmax import (
    BEFORE,
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGITS,
    MINUS_INF_WORD,
    STEPS_A_NAT,
    SUM,
    SUM_SQ,
    SUM_X,
    TARGET,
    TOTAL,
    add_logits,
    packed_words,
    store_sums,
    transformed,
)
from .shared_constants import PACKED_CHUNK

# What row_scores reads at once: the columns that share a largest logit when they are packed, here as in
# kept_logits.py. A block of row_grad is 8 KiB, two 16-byte loads a thread. With twice as much, float32 scores spill.
CHUNK, BLOCK_BYTES, NUM_WARPS = PACKED_CHUNK, 8192, 8

# What is read one value a row, or follows from the number of rows: its alignment and its size are nobody's business.
_PER_ROW = ["targets", "state", "state_stride", "lse", "coefficients", "coefficient_stride"]
_ANY_VALUE = ["scale", "softcap", "inv_temperature", "column_offset", *_PER_ROW]
_PACKED_PER_ROW = ["tops", "tops_stride", "pack"]


@triton.jit
def _load_raw(row, bias, columns, mask, HAS_BIAS: tl.constexpr):
    z = tl.load(row + columns, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=[*_ANY_VALUE, *_PACKED_PER_ROW])
def row_scores_kernel(
    logits,
    row_stride,
    targets,
    bias,
    state,
    state_stride,
    words,
    words_stride,
    tops,
    tops_stride,
    pack,
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
    """Adds one row of a tile to its state in one read; the state's rows are in row_kernels.py. Packs it if told to.

    Whether it packs is no compile-time constant: another kernel would have other threads add up other columns, and a
    row's sums would no longer be the same, bit by bit, with packing and without.
    """
    index = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row = logits + index * row_stride
    target = tl.load(targets + index) - column_offset
    state += index
    nothing = tl.zeros([1], tl.float32)
    top = tl.load(state).to(tl.float32)
    s = tl.load(state + state_stride * SUM).to(tl.float32)
    sum_x, sum_sq, total, before = nothing, nothing, nothing, nothing
    if ENTROPY & OUTPUTS:
        sum_x = tl.load(state + state_stride * SUM_X).to(tl.float32)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        sum_sq = tl.load(state + state_stride * SUM_SQ).to(tl.float32)
    if MEAN_LOGITS & OUTPUTS:
        total = tl.load(state + state_stride * TOTAL).to(tl.float32)
    if IS_TOP1 & OUTPUTS:
        before = tl.load(state + state_stride * BEFORE).to(tl.float32)
    sums = (top, s, sum_x, sum_sq, total, before)
    for start in range(0, num_columns, BLOCK):
        columns = (start + tl.arange(0, BLOCK))[None, :]
        mask = columns < num_columns
        z = _load_raw(row[:, None], bias, columns, mask, HAS_BIAS)
        u, _ = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
        u = tl.where(mask, u, -float("inf"))
        sums, others = add_logits(sums, u, mask, columns - target[:, None], OUTPUTS)
        if pack:
            chunk_top = tl.max(others, 1)
            tl.store(words + index[:, None] * words_stride + columns, packed_words(others, chunk_top), mask=mask)
            tl.store(tops + index * tops_stride + start // BLOCK, chunk_top)
    store_sums(state, state_stride, sums, None, OUTPUTS)
    here = (target >= 0) & (target < num_columns)
    z = _load_raw(row, bias, target, here, HAS_BIAS)
    target_logit, _ = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    tl.store(state + state_stride * TARGET, target_logit, mask=here)


@triton.jit
def _grad_of(u, is_target, lse, coefficients, coefficient_stride):
    """Returns the gradient with respect to transformed logits u of one row, whose numbers the pointers point at."""
    LOG2E: tl.constexpr = 1.4426950408889634
    a = tl.load(coefficients)
    b = tl.load(coefficients + coefficient_stride)
    d = tl.load(coefficients + 2 * coefficient_stride)
    e = tl.load(coefficients + 3 * coefficient_stride)
    x = u - tl.load(lse)
    p = tl.exp2(x * LOG2E)
    return tl.where(is_target, d, tl.where(p == 0.0, 0.0, p * (a + b * x)) + e)


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
    """Computes the gradient of one tile of a row; each element depends on itself only, so `out` may be `logits`."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    is_target = columns == tl.load(targets + index) - column_offset
    z = _load_raw(logits + index * row_stride, bias, columns, mask, HAS_BIAS)
    u, derivative = transformed(z, scale, softcap, inv_temperature, HAS_SOFTCAP)
    du = _grad_of(u, is_target, lse + index, coefficients + index, coefficient_stride)
    tl.store(out + index * out_stride + columns, (du * derivative).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_ANY_VALUE, *_PACKED_PER_ROW, "rows", "derivative"])
def row_grad_packed_kernel(
    words,
    words_stride,
    tops,
    tops_stride,
    rows,
    targets,
    lse,
    coefficients,
    coefficient_stride,
    out,
    out_stride,
    num_columns,
    column_offset,
    derivative,
    HAS_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the gradient of some chunks of a packed row; like row_grad_kernel, it may take the words' place."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    is_target = columns == tl.load(targets + index) - column_offset
    source = tl.load(rows + index) if HAS_ROWS else index
    code = tl.load(words + source * words_stride + columns, mask=mask, other=0).to(tl.int32) & 0xFFFF
    if CHUNK == BLOCK:
        top = tl.load(tops + source * tops_stride + tl.program_id(1))
    else:
        top = tl.load(tops + source * tops_stride + columns // CHUNK, mask=mask, other=0.0)
    u = tl.where(code == MINUS_INF_WORD, -float("inf"), top - code.to(tl.float32) * (1.0 / STEPS_A_NAT))
    du = _grad_of(u, is_target, lse + index, coefficients + index, coefficient_stride)
    tl.store(out + index * out_stride + columns, (du * derivative).to(out.dtype.element_ty), mask=mask)


def _launch_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
    words: torch.Tensor | None = None,
    tops: torch.Tensor | None = None,
) -> None:
    rows, columns = logits.shape
    if rows == 0 or columns == 0:
        return
    pack = words is not None
    if not pack:  # some address of the same types, for the same kernel
        words, tops = logits.as_strided((1, 1), (1, 1)).view(torch.int16), logits
    row_scores_kernel[(rows,)](
        logits,
        logits.stride(0),
        targets.contiguous(),
        logits if bias is None else bias.contiguous(),
        state,
        state.stride(0),
        words,
        words.stride(0) if pack else 0,
        tops,
        tops.stride(0),
        int(pack),
        columns,
        column_offset,
        scale,
        softcap,
        inv_temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        OUTPUTS=outputs,
        BLOCK=CHUNK,
        num_warps=NUM_WARPS,
    )


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

    targets: (R,) int64, columns of the full vocabulary; bias: (C,) or None; see row_kernels.py.
    """
    _launch_scores(logits, targets, bias, scale, softcap, inv_temperature, outputs, column_offset, state)


@on_tensors_device
def row_scores_packed(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
    words: torch.Tensor,
    tops: torch.Tensor,
) -> None:
    """Adds a tile as row_scores does, without a softcap, and packs its logits.

    words: (R, >= C) int16; tops: (R, chunks) float32.
    """
    given = (logits, targets, bias, scale, 0.0, inv_temperature)
    _launch_scores(*given, outputs, column_offset, state, words, tops)


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
    """Writes the gradient of raw logits (R, C) to `out` (R, C), which may be the same memory; see row_kernels.py.

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


@on_tensors_device
def row_grad_packed(
    words: torch.Tensor,
    index: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    inv_temperature: float,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    column_offset: int,
    out: torch.Tensor,
    tops: torch.Tensor,
    chunk: int = CHUNK,
) -> None:
    """Writes the gradient of the rows `index` (R,) of packed logits, None for all in order, to `out` (R, C).

    words: (K, >= C) int16; tops: (K, chunks) float32, of `chunk` columns each; lse: (R,) float32; coefficients:
    (4, R) float32. Without an index, a 16-bit `out` may be the words' own memory.
    """
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    row_grad_packed_kernel[(rows, triton.cdiv(columns, CHUNK))](
        words,
        words.stride(0),
        tops,
        tops.stride(0),
        targets if index is None else index.contiguous(),
        targets.contiguous(),
        lse.contiguous(),
        coefficients,
        coefficients.stride(0),
        out,
        out.stride(0),
        columns,
        column_offset,
        scale * inv_temperature,
        HAS_ROWS=index is not None,
        CHUNK=chunk,
        BLOCK=CHUNK,
        num_warps=NUM_WARPS,
    )
