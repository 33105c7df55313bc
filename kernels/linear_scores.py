"""The head's product and its row statistics in one Triton kernel: logits live in registers and reach no memory.

It serves scoring without gradient, see `trl_fast/ops/fused_scores.py`. A program takes a block of rows and one split
of the vocabulary, walks the split tile by tile (a product over the hidden size, accumulated in float32), and adds each
tile to its rows' online sums, which it writes once, at the end. No atomics: the same input gives the same bits. A
split has a fixed width, so a row's result does not depend on how many other rows there are.

Programs of one split follow each other on grid axis 0, so that the split's weights are read from memory once and then
from the cache. Offsets are 64-bit. No number of rows and no scale makes Triton compile again, and no vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device
from .online import add_logits, store_sums, transformed

COLUMNS_PER_SPLIT = 2048


class Tiles(NamedTuple):
    """A configuration: rows and columns of a tile of logits, hidden units that one step multiplies, and so on.

    `pieces`: how many the columns are cut into before they are added to the sums. The sums' temporaries are as large
    as a piece, and with the accumulators they must fit the registers.
    """

    rows: int
    columns: int
    depth: int
    pieces: int
    num_warps: int = 8
    num_stages: int = 3


# By compute capability. Chosen from what the compiler makes of them (no spills, whatever the outputs), not by a race.
TILES = {(8, 0): Tiles(128, 128, 64, 1), (9, 0): Tiles(128, 128, 64, 4), (10, 0): Tiles(128, 256, 64, 8)}


@triton.jit
def _add_tile(
    sums,
    target_logit,
    z,
    start,
    num_columns,
    target,
    bias,
    transform,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The sums and the target's logit (R,) with raw logits z (R, C) of columns start, start + 1, ... added."""
    if PIECES > 1:
        half: tl.constexpr = z.shape[1] // 2
        halves = tl.split(tl.permute(tl.reshape(z, [z.shape[0], 2, half]), (0, 2, 1)))
        for side in tl.static_range(2):
            sums, target_logit = _add_tile(
                sums,
                target_logit,
                halves[side],
                start + side * half,
                num_columns,
                target,
                bias,
                transform,
                HAS_BIAS,
                HAS_SOFTCAP,
                OUTPUTS,
                PIECES // 2,
            )
    else:
        columns = start + tl.arange(0, z.shape[1])
        mask = columns < num_columns
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
        u, _ = transformed(z, *transform, HAS_SOFTCAP)
        u = tl.where(mask[None, :], u, -float("inf"))
        before_target = columns[None, :] < target[:, None]
        sums = add_logits(sums, u, mask[None, :], before_target, OUTPUTS)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], u, 0.0), 1)
    return sums, target_logit


# The parts are written once, by one value a row: nothing is lost if the compiler knows no more than their type.
_PER_ROW = ["targets", "parts", "split_stride", "state_stride", "num_rows"]


@triton.jit(do_not_specialize=["vocab_size", "scale", "softcap", "inv_temperature", *_PER_ROW])
def linear_scores_kernel(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    targets,
    bias,
    parts,
    split_stride,
    state_stride,
    num_rows,
    vocab_size,
    hidden_size,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Sums of a block of rows over one split of the vocabulary, written to the split's state in `parts`."""
    split = tl.program_id(1).to(tl.int64)
    first = split * SPLIT
    num_columns = tl.minimum(vocab_size - first, SPLIT).to(tl.int32)
    weight += first * weight_stride
    bias += first
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Rows and columns beyond the end are those at the end, computed again: that needs no mask in the product.
    inner_rows = tl.minimum(rows, num_rows - 1)
    hidden_rows = hidden + inner_rows[:, None] * hidden_stride
    target = (tl.load(targets + inner_rows) - first).to(tl.int32)
    zeros = tl.zeros([ROWS], tl.float32)
    nothing = zeros - float("inf")
    sums = (nothing, zeros, zeros, zeros, zeros, nothing)
    target_logit = zeros
    for start in range(0, num_columns, COLUMNS):
        columns = tl.minimum(start + tl.arange(0, COLUMNS), num_columns - 1).to(tl.int64)
        weight_rows = weight + columns[None, :] * weight_stride
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, hidden_size, DEPTH):
            units = begin + tl.arange(0, DEPTH)
            inside = units < hidden_size
            x = tl.load(hidden_rows + units[None, :], mask=inside[None, :], other=0.0)
            w = tl.load(weight_rows + units[:, None], mask=inside[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        transform = (scale, softcap, inv_temperature)
        sums, target_logit = _add_tile(
            sums, target_logit, z, start, num_columns, target, bias, transform, HAS_BIAS, HAS_SOFTCAP, OUTPUTS, PIECES
        )
    state = parts + split * split_stride + rows
    store_sums(state, state_stride, sums, rows < num_rows, OUTPUTS)
    tl.store(state + 5 * state_stride, target_logit, mask=rows < num_rows)


def num_splits(vocab_size: int) -> int:
    """Into how many splits the vocabulary falls."""
    return triton.cdiv(vocab_size, COLUMNS_PER_SPLIT)


@on_tensors_device
def partial_states(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    parts: torch.Tensor,
    tiles: Tiles,
) -> None:
    """Writes to `parts` (S, 7, N) float32 what each of the S = num_splits(V) splits adds to the state of rows.py.

    hidden: (N, H) float32|bfloat16|float16; weight: (V, H), dtype of hidden, rows of adjacent elements; targets: (N,)
    int64; bias: (V,) or None. A target's logit is in the part of its split, the others have 0 for it; sums that
    `outputs` does not ask for are left as they are.

    Raises:
        ValueError: the elements of a row of the weight are not adjacent.
    """
    if weight.stride(1) != 1:
        raise ValueError(f"weight: expected rows of adjacent elements, got strides {weight.stride()}")
    num_rows, hidden_size = hidden.shape
    if num_rows == 0:
        return
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    linear_scores_kernel[(triton.cdiv(num_rows, tiles.rows), len(parts))](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        targets.contiguous(),
        weight if bias is None else bias.contiguous(),
        parts,
        parts.stride(0),
        parts.stride(1),
        num_rows,
        weight.shape[0],
        hidden_size,
        scale,
        softcap,
        inv_temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap != 0.0,
        OUTPUTS=outputs,
        SPLIT=COLUMNS_PER_SPLIT,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        PIECES=tiles.pieces,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
