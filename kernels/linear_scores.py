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
from .logit_tiles import NOTHING, RAW, WORDS, product, store_tile, tile_sums
from .online_softmax import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS, TARGET, store_sums


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
# without spills, and not timed. TMA came with 9.0. Pointers take registers too, so without it tiles have half the
# columns; on 12.0 the 100 KB of shared memory hold no more. On 10.0 flattened loops would spill registers.
_WITHOUT_TMA = Tiles(128, 128, 64, 4, tma=False, flatten=False)
TILES = {
    (8, 0): _WITHOUT_TMA._replace(num_stages=4),
    (8, 6): _WITHOUT_TMA,
    (8, 9): _WITHOUT_TMA,
    (9, 0): Tiles(128, 256, 64, 8),
    (10, 0): Tiles(128, 256, 64, 8, flatten=False, capped=False),
    (12, 0): Tiles(128, 128, 64, 4, flatten=False),
}
# The interpreter is slow; any configuration will do.
INTERPRETED_TILES = Tiles(16, 128, 32, 2)
MERGED_ROWS, MERGED_TILES = 32, 32


_PER_ROW = ["targets", "parts", "slot_stride", "tile_stride", "num_rows", "state", "state_stride"]


@triton.jit(do_not_specialize=["vocab_size", "scale", "softcap", "inv_temperature", *_PER_ROW])
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
    row_tiles, column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(vocab_size, COLUMNS)
    factors = (hidden, weight, hidden_stride, weight_stride, hidden_size)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        first_tile = tile // (GROUP * row_tiles) * GROUP
        size, within = tl.minimum(column_tiles - first_tile, GROUP), tile % (GROUP * row_tiles)
        place = (within // size * ROWS, (first_tile + within % size) * COLUMNS, num_rows, vocab_size)
        z = product(factors, place, ROWS, COLUMNS, DEPTH, TMA)
        rows = place[0] + tl.arange(0, ROWS)
        target = tl.load(targets + rows, mask=rows < num_rows, other=-1).to(tl.int32)
        target = tl.where(target < vocab_size, target, -1)
        numbers = (bias, scale, softcap, inv_temperature)
        top, sums = tile_sums(
            *(z, place, target, numbers, kept, kept_stride),
            *(HAS_BIAS, HAS_SOFTCAP, SCALED, OUTPUTS, KEEP, PIECES, TMA),
        )
        slots = parts + (place[1] // COLUMNS).to(tl.int64) * tile_stride + rows
        store_tile(slots, slot_stride, top, sums, rows < num_rows, OUTPUTS)
        here = (target >= place[1]) & (target < place[1] + COLUMNS)
        tl.store(state + state_stride * TARGET + rows, sums[5].to(tl.float64), mask=here)


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
        slot += slot_stride
        tile_sum = tl.load(slot, mask=mask, other=0.0)
        slot += slot_stride
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


@on_tensors_device
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
