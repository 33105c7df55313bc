"""Computes the head's product and its row statistics in one Triton kernel; logits live in registers, and can be kept.

As many programs as the GPU has processors walk over tiles of logits, [rows, columns]; factors come by TMA, the product
is accumulated in float32. Of each tile, while it is in registers, the largest logit of every row but its target's is
found, then the sums relative to it, and, if logits are to be kept, the 16-bit words below it
(`trl_fast/ops/head/kept_logits.py`). A second, small kernel merges the tiles of a row.

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
from .online_softmax import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS, TARGET, packed_words, store_sums


class Tiles(NamedTuple):
    """Holds a configuration: rows and columns of a tile of logits, hidden units that one step multiplies, and so on.

    pieces: how many the columns are cut into before they are added to the sums, whose temporaries must fit the
    registers beside the accumulators; group: how many tiles of columns stand in one group.
    """

    rows: int
    columns: int
    depth: int
    pieces: int
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3


# By compute capability. On an H200 a sketch of this kernel was faster than a product and a row kernel, and with these
# tiles the fastest of twelve (benchmarks/results/gpu). The kernel as it is here has not been timed; elsewhere neither.
TILES = {(9, 0): Tiles(128, 256, 64, 8)}
# The interpreter is slow; any configuration will do.
INTERPRETED_TILES = Tiles(16, 128, 32, 2)
MERGED_ROWS, MERGED_TILES = 32, 32


@triton.jit
def _without_target(u, columns, target, vocab_size):
    """Returns the targets' logits (R,), 0 where they are not here, and u (R, C) with -inf but for other classes."""
    is_target = columns == target
    others = tl.where(is_target | (columns >= vocab_size), -float("inf"), u)
    return tl.sum(tl.where(is_target, u, 0.0), 1), others


@triton.jit
def _add_piece(
    sums,
    u,
    start,
    anchor,
    target,
    num_columns,
    words,
    first_row,
    OUTPUTS: tl.constexpr,
    KEEP: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Returns the sums relative to `anchor` (R,) with logits u (R, C) of columns start, start + 1, ... added.

    The targets' are -inf, and are no part of the sum of logits.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if PIECES > 1:
        half: tl.constexpr = u.shape[1] // 2
        halves = tl.split(tl.permute(tl.reshape(u, [u.shape[0], 2, half]), (0, 2, 1)))
        for side in tl.static_range(2):
            sums = _add_piece(
                sums,
                halves[side],
                start + side * half,
                anchor,
                target,
                num_columns,
                words,
                first_row,
                OUTPUTS,
                KEEP,
                PIECES // 2,
            )
        return sums
    else:
        s, sum_x, sum_sq, total, before = sums
        columns = start + tl.arange(0, u.shape[1])
        if KEEP:
            words.store([first_row, start], packed_words(u, anchor))
        x = u - anchor[:, None]
        e = tl.exp2(x * LOG2E)
        s += tl.sum(e, 1)
        if ENTROPY & OUTPUTS:
            sum_x += tl.sum(tl.where(e == 0.0, 0.0, e * x), 1)
        if LOG_SUM_SQ_PROBS & OUTPUTS:
            sum_sq += tl.sum(e * e, 1)
        if MEAN_LOGITS & OUTPUTS:
            counted = (columns < num_columns)[None, :] & (columns[None, :] != target[:, None])
            total += tl.sum(tl.where(counted, u, 0.0), 1)
        if IS_TOP1 & OUTPUTS:
            earlier = tl.where(columns[None, :] < target[:, None], u, -float("inf"))
            before = tl.maximum(before, tl.max(earlier, 1))
        return s, sum_x, sum_sq, total, before


@triton.jit
def _store_optional(parts, slot_stride, sums, mask, OUTPUTS: tl.constexpr):
    """Writes the sums that OUTPUTS asks for to the slots behind the first two."""
    _, sum_x, sum_sq, total, before = sums
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


@triton.jit(do_not_specialize=["vocab_size", "logit_factor", *_PER_ROW])
def linear_scores_kernel(
    hidden,
    weight,
    words,
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
    logit_factor,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Writes the sums of every tile to its slots in `parts`; the target's logit goes to the state itself."""
    row_tiles = tl.cdiv(num_rows, ROWS)
    column_tiles = tl.cdiv(vocab_size, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first_tile = tile // (GROUP * row_tiles) * GROUP
        size, within = tl.minimum(column_tiles - first_tile, GROUP), tile % (GROUP * row_tiles)
        column_tile = first_tile + within % size
        first_row = within // size * ROWS
        start = column_tile * COLUMNS
        u = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, hidden_size, DEPTH):
            x = hidden.load([first_row, begin])
            w = weight.load([start, begin])
            u = tl.dot(x, w.T, u)
        rows = first_row + tl.arange(0, ROWS)
        there = rows < num_rows
        target = tl.load(targets + rows, mask=there, other=-1).to(tl.int32)
        columns = start + tl.arange(0, COLUMNS)
        if HAS_BIAS:
            u += tl.load(bias + columns, mask=columns < vocab_size, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            u = u * logit_factor
        target_logit, u = _without_target(u, columns[None, :], target[:, None], vocab_size)
        top = tl.max(u, 1)
        # Where everything is -inf, subtract 0: -inf - -inf would be NaN.
        anchor = tl.where(top == -float("inf"), 0.0, top)
        zeros = tl.zeros([ROWS], tl.float32)
        here = there & (target // COLUMNS == column_tile) & (target >= 0) & (target < vocab_size)
        sums = (zeros, zeros, zeros, tl.where(here, target_logit, 0.0), zeros - float("inf"))
        sums = _add_piece(sums, u, start, anchor, target, vocab_size, words, first_row, OUTPUTS, KEEP, PIECES)
        slots = parts + column_tile.to(tl.int64) * tile_stride + rows
        tl.store(slots, top, mask=there)
        tl.store(slots + slot_stride, sums[0], mask=there)
        _store_optional(slots, slot_stride, sums, there, OUTPUTS)
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
    logit_factor: float,
    outputs: int,
    state: torch.Tensor,
    words: torch.Tensor | None,
    tops: torch.Tensor | None,
    tiles: Tiles,
    *,
    vocab_size: int,
) -> None:
    """Writes the state (7, N) float64 of all rows (row_kernels.py), keeps their logits if given room.

    Logits are logit_factor * (hidden weightᵀ + bias). hidden: (N, H) bfloat16|float16; weights: the weight (V, H), or
    slices of its rows in their order, all but the last of whole tiles of columns, each needed until the next is asked
    for; dtype of hidden; rows of all begin at multiples of 16 bytes; targets: (N,) int64; bias: (V,) or None. words:
    (N, V) int16, with rows of that kind, and tops: (N, T) float32, T = num_tiles(V), or both None; vocab_size: V. A
    target outside the vocabulary and sums that `outputs` does not ask for leave what is in the state.
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
        own_words = None if words is None else words[:, start:stop]
        own_targets, own_parts = targets - start if start else targets, parts[:, start // tiles.columns :]
        _score_slice(
            hidden, weight, own_targets, own_bias, logit_factor, outputs, own_words, own_parts, strides, tiles
        )
        start = stop
    kept = (parts, 0) if tops is None else (tops, tops.stride(0))
    sizes = {"ROWS": MERGED_ROWS, "TILES": MERGED_TILES}
    merge_tiles_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
        parts, *strides, *kept, num_rows, count, OUTPUTS=outputs, KEEP=tops is not None, **sizes
    )


def _score_slice(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    logit_factor: float,
    outputs: int,
    words: torch.Tensor | None,
    parts: torch.Tensor,
    strides: tuple[int, int, torch.Tensor, int],
    tiles: Tiles,
) -> None:
    """Writes the parts of the tiles of a slice of the vocabulary, weight (C, H), and the targets' logits.

    strides: of the parts' slots and tiles; the state (7, N) and its rows' stride. The others as in linear_scores.
    """
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    # Without words any descriptor does: nothing is stored.
    kept = hidden if words is None else words
    blocks = ((hidden, tiles.rows, tiles.depth), (weight, tiles.columns, tiles.depth))
    blocks += ((kept, tiles.rows, tiles.columns // tiles.pieces),)
    programs = min(_num_programs(hidden.device), num_tiles(num_columns, tiles) * triton.cdiv(num_rows, tiles.rows))
    linear_scores_kernel[(programs,)](
        *(TensorDescriptor.from_tensor(matrix, sizes) for matrix, *sizes in blocks),
        targets.contiguous(),
        parts if bias is None else bias.contiguous(),
        parts,
        *strides,
        num_rows,
        num_columns,
        hidden_size,
        logit_factor,
        HAS_BIAS=bias is not None,
        SCALED=logit_factor != 1.0,
        OUTPUTS=outputs,
        KEEP=words is not None,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        GROUP=tiles.group,
        PIECES=tiles.pieces,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
