"""Estimates scoring by the kernel made with CUTLASS, csrc/cuda/fused_scores_sm90.cu, from its tiles and its code.

Nothing is run. Two warpgroups of a multiprocessor take turns: one multiplies a tile while the other scores the one
before. A tile thus takes the longer of both; memory is read and written meanwhile. What is left to see is the last
tile's scoring, processors that have no tile in the last round, and the kernel that merges the parts.
"""

from __future__ import annotations

from trl_fast.planning.gpu_facts import Gpu

from ..head_size import Size

# csrc/cuda/tile_scores.h and fused_scores_sm90.cu: a tile, a part of it, rows of tiles in a cluster, columns of tiles
# in a group that shares rows.
ROWS, COLUMNS, PART_COLUMNS, CLUSTER, GROUP = 128, 192, 64, 2, 8
# Multiprocessors of an H100 (SXM) and an H200, and their clock while they multiply, hertz.
PROCESSORS, CLOCK = 132, 1.4e9
# Instructions of a warp for a tile, of which each of its threads has LOGITS, in so many parts of rows: generously what
# the compiled code takes a logit (the largest, its word, its exponential, the sum) and a part (exchanges, writing).
LOGITS = ROWS * COLUMNS // 128
INSTRUCTIONS = 20 * LOGITS + 150 * (ROWS // 32 * COLUMNS // PART_COLUMNS)


def overlapped_milliseconds(size: Size, gpu: Gpu, *, keep: bool = False) -> float:
    """Returns milliseconds of scoring rows on a Hopper GPU, log-probs alone; keep: logits are kept in 16 bits."""
    tiles = -(-size.rows // (ROWS * CLUSTER)) * CLUSTER * -(-size.vocab // COLUMNS)
    rounds = -(-tiles // PROCESSORS)
    product = 2 * ROWS * COLUMNS * size.hidden / (gpu.products / PROCESSORS)
    scoring = INSTRUCTIONS / CLOCK  # each of a warpgroup's warps has a scheduler of its own
    # Of each row and part two numbers; the weight once, hidden states once a group of columns.
    parts = 2 * 4 * size.rows * -(-size.vocab // PART_COLUMNS)
    factors = 2 * size.hidden * (size.vocab + size.rows * -(-size.vocab // (COLUMNS * GROUP)))
    words = 2 * size.rows * size.vocab if keep else 0
    meanwhile = (factors + parts + words) / gpu.memory
    return 1e3 * (max(rounds * max(product, scoring), meanwhile) + scoring + parts / gpu.memory)
