"""Knows the tiles of FlexAttention's kernels where torch's own do not fit a GPU.

torch has one choice for each width and dtype. Compiled ahead of time for sm_80 and sm_90, its forward of 512 channels
in bfloat16 takes 257 KiB of shared memory, which no GPU has, and others keep more numbers than there are registers:
forward in float32 spills up to 136 KiB a thread, backward of 256 channels in bfloat16 72 KiB. Those below fit both
GPUs and spill nothing, or little.
"""

from __future__ import annotations

import torch


def _forward(rows: int, columns: int, warps: int, stages: int) -> dict[str, int]:
    names = ("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages")
    return dict(zip(names, (rows, columns, warps, stages), strict=True))


def _backward(rows: int, columns: int, warps: int, stages: int) -> dict[str, int]:
    """Returns tiles of both halves: of the keys' gradients, and transposed of the queries'."""
    names = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_warps", "bwd_num_stages")
    return dict(zip(names, (rows, columns, columns, rows, warps, stages), strict=True))


# By the bytes of a number, for heads of up to so many channels.
_TILES: dict[int, dict[int, dict[str, int]]] = {
    2: {
        128: {},
        256: _backward(32, 32, 8, 1),
        512: _forward(64, 16, 8, 2),
    },
    4: {
        64: _forward(64, 32, 8, 1),
        128: _forward(64, 16, 8, 1),
        256: _forward(32, 16, 8, 1) | _backward(16, 16, 8, 1),
        512: _forward(16, 16, 8, 1) | _backward(16, 16, 8, 1),
    },
}


def kernel_tiles(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Returns the options of FlexAttention's kernels for the wider one of keys and values; {}: torch's own choice."""
    return next((tiles for widest, tiles in _TILES.get(dtype.itemsize, {}).items() if width <= widest), {})
