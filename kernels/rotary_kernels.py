"""Turns the heads of a transformer by their positions in Triton, alone and after a norm of each head.

`trl_fast/ops/layers` specifies the kernels. A program takes some rows, a row being one head of one token, read by any
strides and written side by side: (B, T, heads, D). Angles are those of the token: its heads have them from the cache.
Products and sums are not fused, so that numbers are rounded where transformers' code rounds them. Offsets are 64-bit.
"""

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device
from .layer_kernels import GEMMA, LLAMA

# Elements of a program: sixteen a thread. Which numbers are turned together: places in ops/layers' list of pairs.
ELEMENTS, NUM_WARPS = 2048, 4
HALVES, ADJACENT_TO_HALVES = 0, 2
IS_LLAMA, IS_GEMMA = tl.constexpr(LLAMA), tl.constexpr(GEMMA)
# Bits of a kernel's WAY: pairs lie side by side where they are read, where they are written, in the angles; a pair has
# one angle; one rounding; back. They come first in `BIT & WAY`: in the interpreter, WAY is an int.
READS_ADJACENT, WRITES_ADJACENT, ANGLES_ADJACENT = map(tl.constexpr, (1, 2, 4))
ONE_ANGLE, UPCAST, BACK = map(tl.constexpr, (8, 16, 32))

# Counts of rows, heads and tokens are nobody's business.
_ANY_VALUE = ["num_rows", "num_heads", "num_tokens"]


@triton.jit
def _load_pairs(rows, there, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADJACENT: tl.constexpr):
    """Loads the first and the second numbers of pairs, (ROWS, BLOCK) float32 each; rows point to heads."""
    if ADJACENT:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(rows[:, None] + columns, mask=there[:, None] & (columns < 2 * PAIRS), other=0.0)
        a, b = tl.split(tl.reshape(both.to(tl.float32), [ROWS, BLOCK, 2]))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        mask = there[:, None] & (columns < PAIRS)
        a = tl.load(rows[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(rows[:, None] + columns + PAIRS, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    rows, there, a, b, PAIRS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ADJACENT: tl.constexpr
):
    dtype: tl.constexpr = rows.dtype.element_ty
    if ADJACENT:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [ROWS, 2 * BLOCK])
        tl.store(rows[:, None] + columns, both, mask=there[:, None] & (columns < 2 * PAIRS))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        mask = there[:, None] & (columns < PAIRS)
        tl.store(rows[:, None] + columns, a.to(dtype), mask=mask)
        tl.store(rows[:, None] + columns + PAIRS, b.to(dtype), mask=mask)


@triton.jit
def _angles(
    rows,
    there,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADJACENT: tl.constexpr,
    ONE: tl.constexpr,
):
    """Loads cos or sin for the first and the second numbers; ONE: there is one for both."""
    if ONE:
        columns = tl.arange(0, BLOCK)[None, :]
        a = tl.load(rows[:, None] + columns, mask=there[:, None] & (columns < PAIRS), other=0.0).to(tl.float32)
        return a, a
    return _load_pairs(rows, there, PAIRS, ROWS, BLOCK, ADJACENT)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _turned(
    pair,
    cos,
    sin,
    there,
    dtype: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WAY: tl.constexpr,
):
    """Returns (a cos - b sin, b cos + a sin), or the transposed rotation; cos and sin are pointers to the angles."""
    a, b = pair
    cos_a, cos_b = _angles(cos, there, PAIRS, ROWS, BLOCK, ANGLES_ADJACENT & WAY, ONE_ANGLE & WAY)
    sin_a, sin_b = _angles(sin, there, PAIRS, ROWS, BLOCK, ANGLES_ADJACENT & WAY, ONE_ANGLE & WAY)
    if BACK & WAY:
        sin_a, sin_b = -sin_b, -sin_a
    if UPCAST & WAY:
        return a * cos_a - b * sin_a, b * cos_b + a * sin_b
    first = _rounded(a * cos_a, dtype) - _rounded(b * sin_a, dtype)
    return first, _rounded(b * cos_b, dtype) + _rounded(a * sin_b, dtype)


@triton.jit
def _place(rows, num_heads, num_tokens):
    """Returns row of the batch, head and token, 64-bit, of rows that go by batch, token and head."""
    tokens = rows // num_heads
    batch, token = tokens // num_tokens, tokens % num_tokens
    return batch.to(tl.int64), (rows % num_heads).to(tl.int64), token.to(tl.int64)


@triton.jit(do_not_specialize=_ANY_VALUE)
def rotary_kernel(
    x,
    x_batch,
    x_head,
    x_token,
    cos,
    cos_batch,
    cos_token,
    sin,
    sin_batch,
    sin_token,
    out,
    num_rows,
    num_heads,
    num_tokens,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    WAY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Turns the first 2 PAIRS of WIDTH numbers of ROWS heads; BLOCK and REST are powers of two for them and others."""
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    batch, head, token = _place(rows, num_heads, num_tokens)
    given = x + batch * x_batch + head * x_head + token * x_token
    to = out + rows.to(tl.int64) * WIDTH
    pair = _load_pairs(given, there, PAIRS, ROWS, BLOCK, READS_ADJACENT & WAY)
    of_cos, of_sin = cos + batch * cos_batch + token * cos_token, sin + batch * sin_batch + token * sin_token
    a, b = _turned(pair, of_cos, of_sin, there, dtype, PAIRS, ROWS, BLOCK, WAY)
    _store_pairs(to, there, a, b, PAIRS, ROWS, BLOCK, WRITES_ADJACENT & WAY)
    if REST:
        columns = 2 * PAIRS + tl.arange(0, REST)[None, :]
        mask = there[:, None] & (columns < WIDTH)
        tl.store(to[:, None] + columns, tl.load(given[:, None] + columns, mask=mask), mask=mask)


@triton.jit
def _factors(weight, columns, inside, CAST: tl.constexpr):
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return w + 1.0 if IS_GEMMA == CAST else w


@triton.jit
def _factors_of_pairs(weight, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ADJACENT: tl.constexpr, CAST: tl.constexpr):
    """Loads the factors of the first and the second numbers of pairs, (1, BLOCK) float32 each."""
    pairs = tl.arange(0, BLOCK)[None, :]
    first, second = (2 * pairs, 2 * pairs + 1) if ADJACENT else (pairs, pairs + PAIRS)
    inside = pairs < PAIRS
    return _factors(weight, first, inside, CAST), _factors(weight, second, inside, CAST)


@triton.jit
def _normed(x, r, w, dtype: tl.constexpr, CAST: tl.constexpr):
    n = x * r
    return _rounded((_rounded(n, dtype) if IS_LLAMA == CAST else n) * w, dtype)


@triton.jit(do_not_specialize=[*_ANY_VALUE, "eps", "rstd"])
def norm_rotary_kernel(
    x,
    x_batch,
    x_head,
    x_token,
    weight,
    cos,
    cos_batch,
    cos_token,
    sin,
    sin_batch,
    sin_token,
    out,
    rstd,
    num_rows,
    num_heads,
    num_tokens,
    eps,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    WAY: tl.constexpr,
    CAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Normalises ROWS heads and turns them, as in rotary_kernel; the norm's 1 / sqrt goes to rstd (rows,)."""
    dtype: tl.constexpr = out.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    batch, head, token = _place(rows, num_heads, num_tokens)
    given = x + batch * x_batch + head * x_head + token * x_token
    to = out + rows.to(tl.int64) * WIDTH
    a, b = _load_pairs(given, there, PAIRS, ROWS, BLOCK, READS_ADJACENT & WAY)
    squares = tl.sum(a * a + b * b, 1)
    if REST:
        columns = 2 * PAIRS + tl.arange(0, REST)[None, :]
        mask = there[:, None] & (columns < WIDTH)
        c = tl.load(given[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(c * c, 1)
    r = 1.0 / tl.sqrt_rn(squares / WIDTH + eps)
    tl.store(rstd + rows, r, mask=there)
    r = r[:, None]
    w_a, w_b = _factors_of_pairs(weight, PAIRS, BLOCK, READS_ADJACENT & WAY, CAST)
    pair = _normed(a, r, w_a, dtype, CAST), _normed(b, r, w_b, dtype, CAST)
    of_cos, of_sin = cos + batch * cos_batch + token * cos_token, sin + batch * sin_batch + token * sin_token
    a, b = _turned(pair, of_cos, of_sin, there, dtype, PAIRS, ROWS, BLOCK, WAY)
    _store_pairs(to, there, a, b, PAIRS, ROWS, BLOCK, WRITES_ADJACENT & WAY)
    if REST:
        w_c = _factors(weight, columns, columns < WIDTH, CAST)
        tl.store(to[:, None] + columns, _normed(c, r, w_c, dtype, CAST).to(dtype), mask=mask)


@triton.jit
def _through_norm(g, n, w, dtype: tl.constexpr, CAST: tl.constexpr):
    """Returns the gradients by n = x rstd and by the weight; g is that by the norm."""
    if IS_LLAMA == CAST:
        return _rounded(g * w, dtype), g * _rounded(n, dtype)
    return g * w, g * n


@triton.jit
def _by_normed(
    of_grad,
    given,
    r,
    weight,
    there,
    angles,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WAY: tl.constexpr,
    CAST: tl.constexpr,
):
    """Turns gradients of pairs back; returns n, the gradients by n and by the weight, of first and second numbers.

    The gradient is read as the result was written, x as it was read.
    """
    dtype: tl.constexpr = given.dtype.element_ty
    w_a, w_b = _factors_of_pairs(weight, PAIRS, BLOCK, READS_ADJACENT & WAY, CAST)
    pair = _load_pairs(of_grad, there, PAIRS, ROWS, BLOCK, WRITES_ADJACENT & WAY)
    cos, sin = angles
    g_a, g_b = _turned(pair, cos, sin, there, dtype, PAIRS, ROWS, BLOCK, BACK | WAY)
    a, b = _load_pairs(given, there, PAIRS, ROWS, BLOCK, READS_ADJACENT & WAY)
    a, b = a * r, b * r
    by_a, of_a = _through_norm(_rounded(g_a, dtype), a, w_a, dtype, CAST)
    by_b, of_b = _through_norm(_rounded(g_b, dtype), b, w_b, dtype, CAST)
    return a, b, by_a, by_b, of_a, of_b


@triton.jit
def _rest_by_normed(of_grad, given, r, weight, columns, mask, WIDTH: tl.constexpr, CAST: tl.constexpr):
    """Returns the same of the numbers that pass."""
    dtype: tl.constexpr = given.dtype.element_ty
    places = columns[None, :]
    w = _factors(weight, places, places < WIDTH, CAST)
    g = tl.load(of_grad[:, None] + places, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(given[:, None] + places, mask=mask, other=0.0).to(tl.float32) * r
    by_n, by_weight = _through_norm(g, n, w, dtype, CAST)
    return n, by_n, by_weight


@triton.jit
def _store_sums(partials, sum_a, sum_b, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ADJACENT: tl.constexpr):
    pairs = tl.arange(0, BLOCK)
    first, second = (2 * pairs, 2 * pairs + 1) if ADJACENT else (pairs, pairs + PAIRS)
    tl.store(partials + first, tl.sum(sum_a, 0), mask=pairs < PAIRS)
    tl.store(partials + second, tl.sum(sum_b, 0), mask=pairs < PAIRS)


@triton.jit(do_not_specialize=[*_ANY_VALUE, "num_programs", "rstd"])
def norm_rotary_backward_kernel(
    grad,
    grad_batch,
    grad_head,
    grad_token,
    x,
    x_batch,
    x_head,
    x_token,
    weight,
    rstd,
    cos,
    cos_batch,
    cos_token,
    sin,
    sin_batch,
    sin_token,
    grad_x,
    partials,
    num_rows,
    num_heads,
    num_tokens,
    num_programs,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    WAY: tl.constexpr,
    CAST: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """Turns gradients back and takes them through the norm: every num_programs-th group of ROWS heads."""
    sum_a, sum_b = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    sum_c = tl.zeros([ROWS, REST if REST else 1], tl.float32)
    partials += tl.program_id(0).to(tl.int64) * WIDTH
    columns = 2 * PAIRS + tl.arange(0, REST if REST else 1)
    for group in tl.range(tl.program_id(0), tl.cdiv(num_rows, ROWS), num_programs):
        rows = group * ROWS + tl.arange(0, ROWS)
        there = rows < num_rows
        batch, head, token = _place(rows, num_heads, num_tokens)
        g = grad + batch * grad_batch + head * grad_head + token * grad_token
        given = x + batch * x_batch + head * x_head + token * x_token
        angles = cos + batch * cos_batch + token * cos_token, sin + batch * sin_batch + token * sin_token
        r = tl.load(rstd + rows, mask=there, other=0.0)[:, None]
        a, b, by_a, by_b, of_a, of_b = _by_normed(g, given, r, weight, there, angles, PAIRS, ROWS, BLOCK, WAY, CAST)
        sum_a, sum_b, products = sum_a + of_a, sum_b + of_b, tl.sum(by_a * a + by_b * b, 1)
        to, mask = grad_x + rows.to(tl.int64) * WIDTH, there[:, None] & (columns < WIDTH)[None, :]
        if REST:
            c, by_c, of_c = _rest_by_normed(g, given, r, weight, columns, mask, WIDTH, CAST)
            sum_c, products = sum_c + of_c, products + tl.sum(by_c * c, 1)
            c = r * (by_c - c * (products[:, None] / WIDTH))
            tl.store(to[:, None] + columns[None, :], c.to(grad_x.dtype.element_ty), mask=mask)
        a, b = r * (by_a - a * (products[:, None] / WIDTH)), r * (by_b - b * (products[:, None] / WIDTH))
        _store_pairs(to, there, a, b, PAIRS, ROWS, BLOCK, READS_ADJACENT & WAY)
    if HAS_PARTIALS:
        _store_sums(partials, sum_a, sum_b, PAIRS, BLOCK, READS_ADJACENT & WAY)
        if REST:
            tl.store(partials + columns, tl.sum(sum_c, 0), mask=columns < WIDTH)


def rotary_constants(
    width: int, turned: int, pairs: int, one_angle_a_pair: bool, upcast: bool, is_backward: bool
) -> dict[str, int]:
    """Returns the compile-time constants of heads of `width` numbers of which the first `turned` are turned."""
    is_adjacent, stay_adjacent = pairs != HALVES, pairs not in (HALVES, ADJACENT_TO_HALVES)
    reads, writes = (stay_adjacent, is_adjacent) if is_backward else (is_adjacent, stay_adjacent)
    bits = (reads, writes, is_adjacent, one_angle_a_pair, upcast, is_backward)
    return {
        "WIDTH": width,
        "PAIRS": turned // 2,
        "WAY": sum(1 << place for place, on in enumerate(bits) if on),
        "ROWS": max(ELEMENTS // triton.next_power_of_2(width), 1),
        "BLOCK": triton.next_power_of_2(max(turned // 2, 1)),
        "REST": triton.next_power_of_2(width - turned) if width > turned else 0,
    }


def _with_strides(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[list, list]:
    """Returns heads (B, heads, T, D) with their strides, and the angles (B or 1, T, R) with theirs."""
    angles = [given for t in (cos, sin) for given in (t, 0 if t.shape[0] == 1 else t.stride(0), t.stride(1))]
    return [x, *x.stride()[:3]], angles


@on_tensors_device
def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: int,
    one_angle_a_pair: bool,
    upcast: bool,
    is_backward: bool,
    out: torch.Tensor,
) -> None:
    """Fills out (B, heads, T, D), a view of a contiguous (B, T, heads, D), with the heads of x, turned.

    x is contiguous in D; cos and sin (B or 1, T, R), or (B or 1, T, R / 2) with one angle a pair, in their last.
    """
    if x.numel() == 0:
        return
    batch, heads, tokens, width = x.shape
    constants = rotary_constants(
        width, cos.shape[2] * (2 if one_angle_a_pair else 1), pairs, one_angle_a_pair, upcast, is_backward
    )
    num_rows, (given, angles) = batch * heads * tokens, _with_strides(x, cos, sin)
    rotary_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
        *given,
        *angles,
        out,
        num_rows,
        heads,
        tokens,
        **constants,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@on_tensors_device
def norm_rotary(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cast: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: int,
    one_angle_a_pair: bool,
    upcast: bool,
    out: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """Fills out as `rotary` does, with heads that are normalised first, and rstd (B T heads,) float32; weight (D,)."""
    if x.numel() == 0:
        return
    batch, heads, tokens, width = x.shape
    constants = rotary_constants(
        width, cos.shape[2] * (2 if one_angle_a_pair else 1), pairs, one_angle_a_pair, upcast, False
    )
    num_rows, (given, angles) = batch * heads * tokens, _with_strides(x, cos, sin)
    norm_rotary_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
        *given,
        weight,
        *angles,
        out,
        rstd,
        num_rows,
        heads,
        tokens,
        eps,
        **constants,
        CAST=cast,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@on_tensors_device
def norm_rotary_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    cast: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pairs: int,
    one_angle_a_pair: bool,
    upcast: bool,
    grad_x: torch.Tensor,
    partials: torch.Tensor | None,
) -> None:
    """Fills grad_x, which lies as out does, and partials (P, D), whose rows add up to the weight's gradient, if given.

    grad: (B, heads, T, D) by any strides but for D, by the result of `norm_rotary`.
    """
    if x.numel() == 0:
        return
    batch, heads, tokens, width = x.shape
    constants = rotary_constants(
        width, cos.shape[2] * (2 if one_angle_a_pair else 1), pairs, one_angle_a_pair, upcast, False
    )
    num_rows, (given, angles) = batch * heads * tokens, _with_strides(x, cos, sin)
    num_programs = triton.cdiv(num_rows, constants["ROWS"]) if partials is None else partials.shape[0]
    norm_rotary_backward_kernel[(num_programs,)](
        grad,
        *grad.stride()[:3],
        *given,
        weight,
        rstd,
        *angles,
        grad_x,
        rstd if partials is None else partials,
        num_rows,
        heads,
        tokens,
        num_programs,
        **constants,
        CAST=cast,
        HAS_PARTIALS=partials is not None,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
