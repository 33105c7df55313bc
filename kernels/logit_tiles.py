"""Computes a tile of logits and its sums, for the fused kernel of the head (linear_scores.py).

A tile is cut into pieces of columns, which are transformed and added to the sums one after the other.
"""

import triton
import triton.language as tl

from .online_softmax import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS, packed_words, transformed

# What of the logits is kept.
NOTHING, WORDS, RAW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _begun(matrix, first, num_rows, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Returns where the first DEPTH numbers of ROWS rows of a factor lie, (ROWS, DEPTH); by TMA nothing of use.

    A row that is not there is one that is: its products are left out of all sums.
    """
    if TMA:
        return first
    else:
        rows = tl.minimum(first + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        return matrix + rows[:, None] * tl.multiple_of(stride, 8) + tl.arange(0, DEPTH)[None, :]


@triton.jit
def product(factors, place, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """Returns a tile (ROWS, COLUMNS) float32 of hidden weightᵀ.

    factors: hidden, weight, their strides, units of a row; place: first row and column, number of rows and columns.
    """
    hidden, weight, hidden_stride, weight_stride, hidden_size = factors
    first_row, first_column, num_rows, num_columns = place
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    x_place = _begun(hidden, first_row, num_rows, hidden_stride, ROWS, DEPTH, TMA)
    w_place = _begun(weight, first_column, num_columns, weight_stride, COLUMNS, DEPTH, TMA)
    for begin in range(0, hidden_size, DEPTH):
        if TMA:
            x, w = hidden.load([first_row, begin]), weight.load([first_column, begin])
        else:
            mask = (tl.arange(0, DEPTH) < tl.multiple_of(hidden_size, 8) - begin)[None, :]
            x = tl.load(x_place + begin, mask=mask, other=0.0)
            w = tl.load(w_place + begin, mask=mask, other=0.0)
        z = tl.dot(x, w.T, z)
    return z


@triton.jit
def _cut(z, PIECES: tl.constexpr):
    """Returns the columns of z (R, C) as a tuple of so many tensors (R, C / PIECES)."""
    if PIECES == 1:
        return (z,)
    else:
        half: tl.constexpr = z.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, half]), (0, 2, 1)))
        return _cut(left, PIECES // 2) + _cut(right, PIECES // 2)


@triton.jit
def _keep(kept, stride, place, start, values, TMA: tl.constexpr):
    """Writes values (R, C) of columns from `start` on to kept logits; what is beyond rows and columns is left out."""
    first_row, _, num_rows, num_columns = place
    if TMA:
        kept.store([first_row, start], values)
    else:
        rows = first_row + tl.arange(0, values.shape[0])
        columns = start + tl.arange(0, values.shape[1])
        to = kept + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(to, values, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit
def _others(
    z,
    from_target,
    columns_left,
    numbers,
    start,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Returns logits u (R, C), -inf for targets and beyond the vocabulary, and the targets' own (R,), 0 without one.

    z: raw; from_target: (R,) the target's column of these; columns_left: of the vocabulary; numbers: bias, which is
    read from `start` on, scale, softcap, inv_temperature; without a softcap the scale is the factor of logits.
    """
    bias, scale, softcap, inv_temperature = numbers
    offsets = tl.arange(0, z.shape[1])
    if HAS_BIAS:
        z += tl.load(bias + start + offsets, mask=offsets < columns_left, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z, _ = transformed(z, scale, softcap, inv_temperature, True)
    elif SCALED:
        z = z * scale
    is_target = offsets[None, :] == from_target[:, None]
    others = tl.where(is_target | (offsets >= columns_left)[None, :], -float("inf"), z)
    return others, tl.sum(tl.where(is_target, z, 0.0), 1)


@triton.jit
def _add_piece(sums, u, from_target, columns_left, anchor, OUTPUTS: tl.constexpr):
    """Returns the sums relative to `anchor` (R,) with logits u (R, C) added; see _others.

    The targets' are -inf, and are no part of the sum of logits.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    s, sum_x, sum_sq, total, before, own = sums
    offsets = tl.arange(0, u.shape[1])[None, :]
    x = u - anchor[:, None]
    e = tl.exp2(x * LOG2E)
    s += tl.sum(e, 1)
    if ENTROPY & OUTPUTS:
        sum_x += tl.sum(tl.where(e == 0.0, 0.0, e * x), 1)
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        sum_sq += tl.sum(e * e, 1)
    if MEAN_LOGITS & OUTPUTS:
        counted = (offsets < columns_left) & (offsets != from_target[:, None])
        total += tl.sum(tl.where(counted, u, 0.0), 1)
    if IS_TOP1 & OUTPUTS:
        before = tl.maximum(before, tl.max(tl.where(offsets < from_target[:, None], u, -float("inf")), 1))
    return s, sum_x, sum_sq, total, before, own


@triton.jit
def tile_sums(
    z,
    place,
    target,
    numbers,
    kept,
    kept_stride,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KEEP: tl.constexpr,
    PIECES: tl.constexpr,
    TMA: tl.constexpr,
):
    """Returns the largest logit (R,) of each row of a tile but its target's, and the sums relative to it.

    z: (R, C) raw; target: (R,); the others as in product and _others. The sixth of the sums is the target's logit, 0
    where it is not here. Keeps what KEEP says.
    """
    WIDTH: tl.constexpr = z.shape[1] // PIECES
    first_column, num_columns = place[1], place[3]
    pieces, others = _cut(z, PIECES), ()
    top = tl.zeros([z.shape[0]], tl.float32) - float("inf")
    own = tl.zeros([z.shape[0]], tl.float32)
    # Branches, which are hardly ever not taken, keep the compiler from working on several pieces at once, for whose
    # temporaries there are no registers.
    for i in tl.static_range(PIECES):
        start = first_column + i * WIDTH
        u = pieces[i]
        if start < num_columns:
            if KEEP == RAW:
                _keep(kept, kept_stride, place, start, u, TMA)
            given = (u, target - start, num_columns - start, numbers, start)
            u, found = _others(*given, HAS_BIAS, HAS_SOFTCAP, SCALED)
            top = tl.maximum(top, tl.max(u, 1))
            own += found
        others = others + (u,)
    # Where everything is -inf, subtract 0: -inf - -inf would be NaN.
    anchor = tl.where(top == -float("inf"), 0.0, top)
    zeros = tl.zeros([z.shape[0]], tl.float32)
    sums = (zeros, zeros, zeros, own, zeros - float("inf"), own)
    for i in tl.static_range(PIECES):
        start = first_column + i * WIDTH
        if start < num_columns:
            if KEEP == WORDS:
                _keep(kept, kept_stride, place, start, packed_words(others[i], anchor), TMA)
            sums = _add_piece(sums, others[i], target - start, num_columns - start, anchor, OUTPUTS)
    return top, sums


@triton.jit
def store_tile(parts, slot_stride, top, sums, mask, OUTPUTS: tl.constexpr):
    """Writes a tile's largest logits and the sums that OUTPUTS asks for to its slots."""
    s, sum_x, sum_sq, total, before, _ = sums
    # Slots are stepped through, for their stride is a 32-bit number whose multiples need not be.
    tl.store(parts, top, mask=mask)
    slot = parts + slot_stride
    tl.store(slot, s, mask=mask)
    slot += slot_stride
    if ENTROPY & OUTPUTS:
        tl.store(slot, sum_x, mask=mask)
        slot += slot_stride
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        tl.store(slot, sum_sq, mask=mask)
        slot += slot_stride
    if MEAN_LOGITS & OUTPUTS:
        tl.store(slot, total, mask=mask)
        slot += slot_stride
    if IS_TOP1 & OUTPUTS:
        tl.store(slot, before, mask=mask)
