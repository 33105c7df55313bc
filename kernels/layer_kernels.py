"""Computes norms and gated activations of a transformer's layers in Triton; `trl_fast/ops/layers` specifies them.

A program of the norms takes whole rows, several of them where they are short, so that a row is read once. Gradients by
a norm's weight are summed in the order of a program's rows, and one row of sums a program is left to be added up: the
same numbers give the same bits. Offsets are 64-bit, and no number of rows makes Triton compile again.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device

# Elements of a program of the norms, at least, and what a warp takes of them: sixteen a thread.
NORM_ELEMENTS, WARP_ELEMENTS, MOST_WARPS = 2048, 512, 32
# Of longer rows, both gradients would spill registers: they are computed one after the other.
WIDEST_OF_BOTH = 8192
# Places in the lists of casts in ops/layers: what is rounded before the product with the weight, and 1 + weight.
LLAMA, GEMMA = 0, 1
# Bytes of a program's gates: two 16-byte accesses a thread.
GATE_BYTES, GATE_WARPS = 4096, 4


@triton.jit
def _factors(weight, columns, inside, HAS_WEIGHT: tl.constexpr, IS_GEMMA: tl.constexpr):
    """Loads what the normalised row is multiplied by, float32; without a weight that is 1."""
    if not HAS_WEIGHT:
        return tl.full(columns.shape, 1.0, tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return w + 1.0 if IS_GEMMA else w


@triton.jit(do_not_specialize=["rstd", "num_rows", "eps"])
def norm_kernel(
    x,
    x_stride,
    residual,
    residual_stride,
    weight,
    total,
    out,
    rstd,
    num_rows,
    num_columns,
    eps,
    HAS_WEIGHT: tl.constexpr,
    IS_GEMMA: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalises ROWS rows, or their sums with a residual; BLOCK is the power of two that a row fits in."""
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < num_columns
    mask = (rows < num_rows)[:, None] & inside
    to = rows[:, None] * num_columns + columns
    v = tl.load(x + rows[:, None] * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        other = tl.load(residual + rows[:, None] * residual_stride + columns, mask=mask, other=0.0)
        v = (v + other.to(tl.float32)).to(dtype)
        tl.store(total + to, v, mask=mask)
        v = v.to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / num_columns + eps)
    tl.store(rstd + rows, r, mask=rows < num_rows)
    normed = v * r[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    w = _factors(weight, columns, inside, HAS_WEIGHT, IS_GEMMA)
    tl.store(out + to, (normed * w).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["rstd", "num_rows", "num_programs"])
def norm_backward_kernel(
    grad,
    grad_stride,
    grad_sum,
    grad_sum_stride,
    x,
    x_stride,
    weight,
    rstd,
    grad_x,
    partials,
    num_rows,
    num_columns,
    num_programs,
    HAS_WEIGHT: tl.constexpr,
    IS_GEMMA: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Differentiates every num_programs-th group of ROWS rows; grad_sum is the sum's own gradient, added at last."""
    dtype: tl.constexpr = x.dtype.element_ty
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < num_columns
    w = _factors(weight, columns, inside, HAS_WEIGHT, IS_GEMMA)
    by_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for group in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), num_programs):
        rows = tl.cast(group, tl.int64) * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & inside
        r = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)[:, None]
        normed = tl.load(x + rows[:, None] * x_stride + columns, mask=mask, other=0.0).to(tl.float32) * r
        g = tl.load(grad + rows[:, None] * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_PARTIALS:
            by_weight += g * (normed.to(dtype).to(tl.float32) if ROUNDS_FIRST else normed)
        if HAS_OUT:
            by_normed = (g * w).to(dtype).to(tl.float32) if ROUNDS_FIRST else g * w
            mean = tl.sum(by_normed * normed, 1) / num_columns
            by_x = (r * (by_normed - normed * mean[:, None])).to(dtype)
            if HAS_SUM:
                of_sum = grad_sum + rows[:, None] * grad_sum_stride + columns
                by_x = (by_x.to(tl.float32) + tl.load(of_sum, mask=mask, other=0.0).to(tl.float32)).to(dtype)
            tl.store(grad_x + rows[:, None] * num_columns + columns, by_x, mask=mask)
    if HAS_PARTIALS:
        to = partials + tl.program_id(0).to(tl.int64) * num_columns + tl.arange(0, BLOCK)
        tl.store(to, tl.sum(by_weight, 0), mask=tl.arange(0, BLOCK) < num_columns)


def norm_tiling(num_columns: int) -> tuple[int, int, int]:
    """Returns rows of a program, columns of its block and warps, for rows of so many columns."""
    block = triton.next_power_of_2(num_columns)
    rows = max(NORM_ELEMENTS // block, 1)
    return rows, block, min(max(rows * block // WARP_ELEMENTS, 1), MOST_WARPS)


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Returns (..., H) as (R, H) with contiguous rows; copied only where its outer dimensions do not lie in a line."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.shape[-1] <= 1 or rows.stride(-1) == 1 else rows.contiguous()


def _of_cast(weight: torch.Tensor | None, cast: int) -> dict[str, bool]:
    """Returns the compile-time constants of a norm's weight and of the place of `cast` among ops/layers' casts."""
    has_weight = weight is not None
    return {
        "HAS_WEIGHT": has_weight,
        "IS_GEMMA": has_weight and cast == GEMMA,
        "ROUNDS_FIRST": has_weight and cast == LLAMA,
    }


@on_tensors_device
def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    cast: int,
    out: torch.Tensor,
    total: torch.Tensor | None,
    rstd: torch.Tensor,
) -> None:
    """Fills out (..., H), rstd (rows,) float32 and, with a residual, total = x + residual; all three contiguous.

    x and residual (..., H), weight (H,) and out have one dtype; weight is contiguous.
    """
    if x.numel() == 0:
        return
    x, added = _as_rows(x), _as_rows(x if residual is None else residual)
    num_rows, num_columns = x.shape
    rows, block, num_warps = norm_tiling(num_columns)
    norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        x.stride(0),
        added,
        added.stride(0),
        out if weight is None else weight,
        out if total is None else total,
        out,
        rstd,
        num_rows,
        num_columns,
        eps,
        **_of_cast(weight, cast),
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )


@on_tensors_device
def rms_norm_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    cast: int,
    grad_x: torch.Tensor | None,
    partials: torch.Tensor | None,
) -> None:
    """Fills grad_x (..., H), contiguous, and partials (P, H), whose rows add up to the weight's gradient, if given.

    grad and grad_sum, which is added to grad_x, have shape and dtype of x (..., H). P programs share the rows.
    """
    if x.numel() == 0:
        return
    if x.shape[-1] > WIDEST_OF_BOTH and grad_x is not None and partials is not None:
        rms_norm_backward(grad, grad_sum, x, weight, rstd, cast, grad_x, None)
        rms_norm_backward(grad, None, x, weight, rstd, cast, None, partials)
        return
    grad, x = _as_rows(grad), _as_rows(x)
    of_sum = grad if grad_sum is None else _as_rows(grad_sum)
    num_rows, num_columns = x.shape
    rows, block, num_warps = norm_tiling(num_columns)
    num_programs = triton.cdiv(num_rows, rows) if partials is None else partials.shape[0]
    norm_backward_kernel[(num_programs,)](
        grad,
        grad.stride(0),
        of_sum,
        of_sum.stride(0),
        x,
        x.stride(0),
        x if weight is None else weight,
        rstd,
        grad if grad_x is None else grad_x,
        rstd if partials is None else partials,
        num_rows,
        num_columns,
        num_programs,
        **_of_cast(weight, cast),
        HAS_SUM=grad_sum is not None,
        HAS_OUT=grad_x is not None,
        HAS_PARTIALS=partials is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
    )


@triton.jit
def _exp(x, IS_EXACT: tl.constexpr):
    """Returns e^x; exact: to an ulp or two of float32, where exp2 of the rounded product is off by |x| of them."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if not IS_EXACT:
        return tl.exp2(x * LOG2E)
    x = tl.where(x > 100.0, 100.0, tl.where(x < -100.0, -100.0, x))
    # log 2 in two parts, the first of ten bits: its product with n is exact.
    n = tl.floor(x * LOG2E + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(rest * LOG2E) * tl.exp2(n)


@triton.jit
def _times_sigmoid(x, z, dz, IS_EXACT: tl.constexpr):
    """Returns x sigmoid(z) and its derivative, dz being that of z; where the sigmoid is 0 or 1 it has none."""
    e = _exp(-z, IS_EXACT)
    denominator = 1.0 + e
    value = tl.div_rn(x, denominator) if IS_EXACT else x / denominator
    sigmoid = 1.0 / denominator
    # e sigmoid is 1 - sigmoid, to the last bit where that is next to nothing.
    change = tl.where(tl.abs(z) > 88.0, 0.0, x * dz * (e * sigmoid))
    return value, sigmoid * (1.0 + change)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, IS_EXACT: tl.constexpr):
    """Returns the activation and its derivative at x, float32; ACTIVATION is a place in ops/layers' ACTIVATIONS."""
    if ACTIVATION == 0:
        return _times_sigmoid(x, x, 1.0, IS_EXACT)
    if ACTIVATION == 1:
        # (1 + tanh u) / 2 = sigmoid(2 u)
        square = x * x
        z = 1.5957691216057308 * (x + 0.044715 * square * x)
        return _times_sigmoid(x, z, 1.5957691216057308 * (1.0 + 0.134145 * square), IS_EXACT)
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    density = 0.3989422804014327 * _exp(-0.5 * x * x, IS_EXACT)
    return x * below, below + x * density


@triton.jit
def _block_of(num_columns, blocks, BLOCK: tl.constexpr):
    """Returns this program's row, 64-bit, its columns, 64-bit, and which of them are there.

    blocks: of a row. The host counts them: near 2^31 columns, a sum here would not fit 32 bits.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < num_columns


@triton.jit(do_not_specialize=["blocks"])
def gate_kernel(
    gate,
    gate_stride,
    up,
    up_stride,
    out,
    num_columns,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes activation(gate) · up for BLOCK columns of a row."""
    dtype: tl.constexpr = out.dtype.element_ty
    row, columns, mask = _block_of(num_columns, blocks, BLOCK)
    g = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activated(g, ACTIVATION, dtype == tl.float32)
    tl.store(out + row * num_columns + columns, (value.to(dtype).to(tl.float32) * u).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def gate_backward_kernel(
    grad,
    grad_stride,
    gate,
    gate_stride,
    up,
    up_stride,
    grad_gate,
    grad_gate_stride,
    grad_up,
    grad_up_stride,
    num_columns,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes both gradients for BLOCK columns of a row; the activation is computed again."""
    dtype: tl.constexpr = gate.dtype.element_ty
    row, columns, mask = _block_of(num_columns, blocks, BLOCK)
    out_grad = tl.load(grad + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value, derivative = _activated(g, ACTIVATION, dtype == tl.float32)
    by_gate = ((out_grad * u).to(dtype).to(tl.float32) * derivative).to(dtype)
    tl.store(grad_gate + row * grad_gate_stride + columns, by_gate, mask=mask)
    by_up = (out_grad * value.to(dtype).to(tl.float32)).to(dtype)
    tl.store(grad_up + row * grad_up_stride + columns, by_up, mask=mask)


def _as_one_row(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Returns tensors (R, C) with contiguous rows as one row, where all of them are contiguous."""
    return tuple(t.view(1, -1) for t in tensors) if all(t.is_contiguous() for t in tensors) else tensors


@on_tensors_device
def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: int, out: torch.Tensor) -> None:
    """Fills out (R, C), contiguous; gate and up (R, C) have its dtype and contiguous rows."""
    if gate.numel() == 0:
        return
    gate, up, out = _as_one_row((gate, up, out))
    (num_rows, num_columns), block = gate.shape, GATE_BYTES // gate.element_size()
    blocks = triton.cdiv(num_columns, block)
    gate_kernel[(num_rows * blocks,)](
        gate,
        gate.stride(0),
        up,
        up.stride(0),
        out,
        num_columns,
        blocks,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=GATE_WARPS,
    )


@on_tensors_device
def gated_activation_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: int,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
) -> None:
    """Fills grad_gate and grad_up (R, C), of contiguous rows, as those of all others are."""
    if gate.numel() == 0:
        return
    grad, gate, up, grad_gate, grad_up = tensors = _as_one_row((grad, gate, up, grad_gate, grad_up))
    (num_rows, num_columns), block = gate.shape, GATE_BYTES // gate.element_size()
    blocks = triton.cdiv(num_columns, block)
    strided = (argument for tensor in tensors for argument in (tensor, tensor.stride(0)))
    gate_backward_kernel[(num_rows * blocks,)](
        *strided, num_columns, blocks, ACTIVATION=activation, BLOCK=block, num_warps=GATE_WARPS
    )
