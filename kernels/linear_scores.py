"""Computes the head's product and its row statistics in one Triton kernel; logits live in registers, and can be kept.

As many programs as the GPU has processors walk over tiles of logits, [rows, columns]; factors come by TMA, or where a
GPU has none by asynchronous copies, and the product is accumulated in float32. Of each tile, while it is in registers,
logits are transformed (bias, scale, softcap, temperature), the largest of every row but its target's is found, then
the sums relative to it. If logits are to be kept, they are written on the way: the 16-bit words below that largest one
(`trl_fast/ops/head/kept_logits.py`), or, where these would not do, the raw float32 product. A second, small kernel
merges the tiles of a row.

Tiles that follow each other share columns in groups, so that their part of the weight is read from memory once and
then from the cache. No atomics, and a tile's numbers do not depend on the others: the same row gives the same bits,
however many rows there are, and whether its logits are kept or not. No number of rows and no scale makes Triton
compile again, and no vocabulary.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launching import on_tensors_device
from .online_softmax import (
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGITS,
    TARGET,
    packed_words,
    store_sums,
    transformed,
)


class Tiles(NamedTuple):
    """Holds a configuration: rows and columns of a tile of logits, hidden units that one step multiplies, and so on.

    pieces: how many the columns are cut into before they are added to the sums, whose temporaries must fit the
    registers beside the accumulators; group: how many tiles of columns stand in one group; tma: whether matrices are
    read and written by it; flatten: whether the loops over tiles and hidden units become one, so that the next tile's
    factors are fetched while this one's logits are added up; capped: whether heads with a softcap are served: to keep
    their raw logits takes registers that some have not.
    """

    rows: int
    columns: int
    depth: int
    pieces: int
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = True
    flatten: bool = True
    capped: bool = True


# By compute capability; a GPU that is not here takes two steps, a product and a row kernel. On an H200 a sketch of
# this kernel was measured to be faster than two steps, and with these tiles the fastest of twelve
# (benchmarks/results/gpu). The others are counted to be faster (docs/benchmarks.md has the arithmetic), compiled
# without spills, and not timed. TMA came with 9.0. GPUs with 100 KB of shared memory, whose tensor cores are a quarter
# as fast a processor, take tiles of half the size. On 10.0 flattened loops would spill registers.
TILES = {
    (8, 0): Tiles(128, 256, 32, 8, num_stages=5, tma=False, flatten=False, capped=False),
    (8, 6): Tiles(128, 128, 64, 4, tma=False, flatten=False),
    (8, 9): Tiles(128, 128, 64, 4, tma=False, flatten=False),
    (9, 0): Tiles(128, 256, 64, 8),
    (10, 0): Tiles(128, 256, 64, 8, flatten=False, capped=False),
    (12, 0): Tiles(128, 128, 64, 4, flatten=False),
}
# The interpreter is slow; any configuration will do.
INTERPRETED_TILES = Tiles(16, 128, 32, 2)
MERGED_ROWS, MERGED_TILES = 32, 32
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
def _product(
    hidden,
    weight,
    first_row,
    first_column,
    num_rows,
    num_columns,
    hidden_size,
    hidden_stride,
    weight_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Returns a tile (ROWS, COLUMNS) float32 of hidden weightᵀ."""
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
def _keep(kept, stride, first_row, start, num_rows, num_columns, values, TMA: tl.constexpr):
    """Writes values (R, C) to their place among kept logits; what is beyond rows and columns is left out."""
    if TMA:
        kept.store([first_row, start], values)
    else:
        rows = first_row + tl.arange(0, values.shape[0])
        columns = start + tl.arange(0, values.shape[1])
        place = kept + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(place, values, mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit
def _others(
    z,
    from_target,
    columns_left,
    bias,
    numbers,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Returns logits u (R, C), -inf for targets and beyond the vocabulary, and the targets' own (R,), 0 without one.

    z: raw; from_target: (R,) the target's column of these; columns_left: of the vocabulary; numbers: scale, softcap,
    inv_temperature; without a softcap the first is the factor of logits.
    """
    offsets = tl.arange(0, z.shape[1])
    if HAS_BIAS:
        z += tl.load(bias + offsets, mask=offsets < columns_left, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        scale, softcap, inv_temperature = numbers
        z, _ = transformed(z, scale, softcap, inv_temperature, True)
    elif SCALED:
        z = z * numbers[0]
    is_target = offsets[None, :] == from_target[:, None]
    others = tl.where(is_target | (offsets >= columns_left)[None, :], -float("inf"), z)
    return others, tl.sum(tl.where(is_target, z, 0.0), 1)


@triton.jit
def _add_piece(sums, u, from_target, columns_left, anchor, OUTPUTS: tl.constexpr):
    """Returns the sums relative to `anchor` (R,) with logits u (R, C) added; see _others.

    The targets' are -inf, and are no part of the sum of logits.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    s, sum_x, sum_sq, total, before = sums
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
    return s, sum_x, sum_sq, total, before


@triton.jit
def _store_sums(parts, slot_stride, top, sums, mask, OUTPUTS: tl.constexpr):
    """Writes a tile's largest logits and the sums that OUTPUTS asks for to its slots."""
    s, sum_x, sum_sq, total, before = sums
    tl.store(parts, top, mask=mask)
    tl.store(parts + slot_stride, s, mask=mask)
    slot = parts + 2 * slot_stride
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


_PER_ROW = ["targets", "parts", "slot_stride", "tile_stride", "num_rows", "state", "state_stride"]
_NUMBERS = ["scale", "softcap", "inv_temperature"]


@triton.jit(do_not_specialize=["vocab_size", *_NUMBERS, *_PER_ROW])
def linear_scores_kernel(
    hidden,
    weight,
    kept,
    hidden_stride,
    weight_stride,
    kept_stride,
    targets,
    bias,
    parts,
    slot_stride,
    tile_stride,
    state,
    state_stride,
    num_rows,
    vocab_size,
    hidden_size,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Writes the sums of every tile to its slots in `parts`; the target's logit goes to the state itself.

    hidden, weight, kept: TMA descriptors, or pointers with strides; KEEP: NOTHING, WORDS or RAW.
    """
    WIDTH: tl.constexpr = COLUMNS // PIECES
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(vocab_size, COLUMNS)
    numbers = (scale, softcap, inv_temperature)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first_tile = tile // (GROUP * row_tiles) * GROUP
        size, within = tl.minimum(column_tiles - first_tile, GROUP), tile % (GROUP * row_tiles)
        column_tile = first_tile + within % size
        first_row = within // size * ROWS
        first_column = column_tile * COLUMNS
        z = _product(
            *(
                hidden,
                weight,
                first_row,
                first_column,
                num_rows,
                vocab_size,
                hidden_size,
                hidden_stride,
                weight_stride,
            ),
            *(ROWS, COLUMNS, DEPTH, TMA),
        )
        rows = first_row + tl.arange(0, ROWS)
        there = rows < num_rows
        target = tl.load(targets + rows, mask=there, other=-1).to(tl.int32)
        top = tl.zeros([ROWS], tl.float32) - float("inf")
        target_logit = tl.zeros([ROWS], tl.float32)
        pieces = _cut(z, PIECES)
        others = ()
        # Branches, which are hardly ever not taken, keep the compiler from working on several pieces at once, for
        # whose temporaries there are no registers.
        if KEEP == RAW:
            for i in tl.static_range(PIECES):
                start = first_column + i * WIDTH
                if start < vocab_size:
                    _keep(kept, kept_stride, first_row, start, num_rows, vocab_size, pieces[i], TMA)
        for i in tl.static_range(PIECES):
            start = first_column + i * WIDTH
            u = pieces[i]
            if start < vocab_size:
                given = (u, target - start, vocab_size - start, bias + start, numbers)
                u, own = _others(*given, HAS_BIAS, HAS_SOFTCAP, SCALED)
                top = tl.maximum(top, tl.max(u, 1))
                target_logit += own
            others = others + (u,)
        # Where everything is -inf, subtract 0: -inf - -inf would be NaN.
        anchor = tl.where(top == -float("inf"), 0.0, top)
        zeros = tl.zeros([ROWS], tl.float32)
        here = there & (target // COLUMNS == column_tile) & (target >= 0) & (target < vocab_size)
        sums = (zeros, zeros, zeros, tl.where(here, target_logit, 0.0), zeros - float("inf"))
        for i in tl.static_range(PIECES):
            start = first_column + i * WIDTH
            if start < vocab_size:
                if KEEP == WORDS:
                    packed = packed_words(others[i], anchor)
                    _keep(kept, kept_stride, first_row, start, num_rows, vocab_size, packed, TMA)
                sums = _add_piece(sums, others[i], target - start, vocab_size - start, anchor, OUTPUTS)
        slots = parts + column_tile.to(tl.int64) * tile_stride + rows
        _store_sums(slots, slot_stride, top, sums, there, OUTPUTS)
        tl.store(state + state_stride * TARGET + rows, target_logit.to(tl.float64), mask=here)


@triton.jit(do_not_specialize=["num_tiles", "tops_stride", *_PER_ROW])
def merge_tiles_kernel(
    parts,
    slot_stride,
    tile_stride,
    state,
    state_stride,
    tops,
    tops_stride,
    num_rows,
    num_tiles,
    OUTPUTS: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Merges the parts of all tiles, in their order, to the state of some rows; fills tops (R, tiles) if KEEP."""
    LOG2E: tl.constexpr = 1.4426950408889634
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < num_rows
    top = tl.zeros([ROWS], tl.float32) - float("inf")
    before = top
    s = tl.zeros([ROWS], tl.float64)
    sum_x, sum_sq, total = s, s, s
    for first in range(0, num_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        mask = (tiles < num_tiles)[:, None] & there[None, :]
        slot = parts + tiles.to(tl.int64)[:, None] * tile_stride + rows[None, :]
        tile_top = tl.load(slot, mask=mask, other=-float("inf"))
        tile_sum = tl.load(slot + slot_stride, mask=mask, other=0.0)
        slot += 2 * slot_stride
        if KEEP:
            place = tops + rows.to(tl.int64)[:, None] * tops_stride + tiles[None, :]
            tl.store(place, tl.trans(tile_top), mask=tl.trans(mask))
        new_top = tl.maximum(top, tl.max(tile_top, 0))
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        shift = tl.where(top == -float("inf"), 0.0, top - anchor)
        factor = tl.exp2(shift * LOG2E).to(tl.float64)
        tile_shift = tl.where(tile_top == -float("inf"), 0.0, tile_top - anchor[None, :])
        tile_factor = tl.exp2(tile_shift * LOG2E)
        if ENTROPY & OUTPUTS:
            tile_x = tl.load(slot, mask=mask, other=0.0) + tile_shift * tile_sum
            sum_x = factor * (sum_x + shift * s) + tl.sum((tile_factor * tile_x).to(tl.float64), 0)
            slot += slot_stride
        if LOG_SUM_SQ_PROBS & OUTPUTS:
            squares = tile_factor * tile_factor * tl.load(slot, mask=mask, other=0.0)
            sum_sq = factor * factor * sum_sq + tl.sum(squares.to(tl.float64), 0)
            slot += slot_stride
        if MEAN_LOGITS & OUTPUTS:
            total += tl.sum(tl.load(slot, mask=mask, other=0.0).to(tl.float64), 0)
            slot += slot_stride
        if IS_TOP1 & OUTPUTS:
            before = tl.maximum(before, tl.max(tl.load(slot, mask=mask, other=-float("inf")), 0))
        s = factor * s + tl.sum((tile_factor * tile_sum).to(tl.float64), 0)
        top = new_top
    store_sums(state + rows, state_stride, (top, s, sum_x, sum_sq, total, before), there, OUTPUTS)


def num_tiles(vocab_size: int, tiles: Tiles) -> int:
    """Returns the number of tiles of columns of a vocabulary."""
    return -(-vocab_size // tiles.columns)


def part_bytes(vocab_size: int, outputs: int, tiles: Tiles) -> int:
    """Returns the bytes a row that `linear_scores` holds between its two kernels."""
    return 4 * (2 + outputs.bit_count()) * num_tiles(vocab_size, tiles)


def _num_programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@on_tensors_device
def linear_scores(
    hidden: torch.Tensor,
    weights: Iterable[torch.Tensor],
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: tuple[float, float, float],
    outputs: int,
    state: torch.Tensor,
    kept: torch.Tensor | None,
    tops: torch.Tensor | None,
    tiles: Tiles,
    *,
    vocab_size: int,
) -> None:
    """Writes the state (7, N) float64 of all rows (row_kernels.py), keeps their logits if given room.

    Logits are those of LogitTransform, of hidden weightᵀ. hidden: (N, H) bfloat16|float16; weights: the weight (V, H),
    or slices of its rows in their order, all but the last of whole tiles of columns, each needed until the next is
    asked for; dtype of hidden; rows of all begin at multiples of 16 bytes; targets: (N,) int64; bias: (V,) or None;
    transform: scale, softcap or 0, inv_temperature. kept: (N, V), with rows of that kind, or None: int16 takes words,
    with tops (N, T) float32, T = num_tiles(V); float32 takes the raw product, without tops; vocab_size: V. A target
    outside the vocabulary and sums that `outputs` does not ask for leave what is in the state.
    """
    num_rows, count = hidden.shape[0], num_tiles(vocab_size, tiles)
    if num_rows == 0:
        return
    parts = torch.empty(2 + outputs.bit_count(), count, num_rows, dtype=torch.float32, device=hidden.device)
    strides = (parts.stride(0), parts.stride(1), state, state.stride(0))
    start = 0
    for weight in weights:
        stop = start + weight.shape[0]
        # Columns are counted from the slice's first one.
        own_bias = None if bias is None else bias[start:stop]
        own_kept = None if kept is None else kept[:, start:stop]
        own_targets, own_parts = targets - start if start else targets, parts[:, start // tiles.columns :]
        score_slice(hidden, weight, own_targets, own_bias, transform, outputs, own_kept, own_parts, strides, tiles)
        start = stop
    topped = (parts, 0) if tops is None else (tops, tops.stride(0))
    sizes = {"ROWS": MERGED_ROWS, "TILES": MERGED_TILES}
    merge_tiles_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
        parts, *strides, *topped, num_rows, count, OUTPUTS=outputs, KEEP=tops is not None, **sizes
    )


def score_slice(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: tuple[float, float, float],
    outputs: int,
    kept: torch.Tensor | None,
    parts: torch.Tensor,
    strides: tuple[int, int, torch.Tensor, int],
    tiles: Tiles,
) -> None:
    """Writes the parts of the tiles of a slice of the vocabulary, weight (C, H), and the targets' logits.

    strides: of the parts' slots and tiles; the state (7, N) and its rows' stride. The others as in linear_scores.
    """
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    scale, softcap, inv_temperature = transform
    # Without a cap there is one factor, and it may be 1.
    numbers = (scale, softcap, inv_temperature) if softcap else (scale * inv_temperature, 0.0, 1.0)
    programs = min(_num_programs(hidden.device), num_tiles(num_columns, tiles) * triton.cdiv(num_rows, tiles.rows))
    linear_scores_kernel[(programs,)](
        *_matrices(hidden, weight, kept, tiles),
        targets.contiguous(),
        parts if bias is None else bias.contiguous(),
        parts,
        *strides,
        num_rows,
        num_columns,
        hidden_size,
        *numbers,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        SCALED=numbers[0] != 1.0,
        OUTPUTS=outputs,
        KEEP=(NOTHING if kept is None else WORDS if kept.dtype == torch.int16 else RAW).value,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=tiles.group,
        PIECES=tiles.pieces,
        TMA=tiles.tma,
        FLATTEN=tiles.flatten,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _matrices(
    hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor | None, tiles: Tiles
) -> tuple[object, ...]:
    """Returns what the kernel takes of the factors (N, H), (C, H) and of the room (N, C): descriptors, or pointers."""
    # Without room any matrix does: nothing is stored.
    matrices = (hidden, weight, hidden if kept is None else kept)
    if not tiles.tma:
        return *matrices, *(matrix.stride(0) for matrix in matrices)
    blocks = ((tiles.rows, tiles.depth), (tiles.columns, tiles.depth), (tiles.rows, tiles.columns // tiles.pieces))
    descriptors = (
        TensorDescriptor.from_tensor(matrix, list(block)) for matrix, block in zip(matrices, blocks, strict=True)
    )
    return *descriptors, 0, 0, 0
