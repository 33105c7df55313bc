"""Calls the fused kernel that is made with CUTLASS, csrc/cuda/fused_scores_sm90.cu; compiled for Hopper's GPUs only.

It writes what the Triton kernel does (kernels/linear_scores.py), but in parts of 64 columns, whatever its tiles are.
While one half of a block multiplies, the other scores, so that by count scoring is hidden behind the product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from trl_fast.kernels.shared_constants import FUSED_PART_COLUMNS, FUSED_ROWS

from ..backends import Support, load_cuda_kernels, why_not_built

# What the kernel is compiled for.
CAPABILITY = (9, 0)


class CutlassTiles(NamedTuple):
    """Holds rows of a tile of logits, and columns of a part of one, which are a chunk of kept logits.

    They are compiled in. capped: as of Triton's tiles.
    """

    rows: int = FUSED_ROWS
    columns: int = FUSED_PART_COLUMNS
    capped: bool = True


def supports_cutlass(device: torch.device) -> Support:
    """Tells whether the kernel was built and serves a device, and why."""
    if device.type != "cuda":
        return Support(False, f"the kernel made with CUTLASS runs on a GPU, not on {device.type}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != CAPABILITY:
        return Support(False, f"the kernel made with CUTLASS is for sm_90a, and this GPU is sm_{major}{minor}")
    loaded = load_cuda_kernels()
    if not loaded.ok:
        return loaded
    if not cutlass_is_built():
        return Support(False, f"the extension was built without CUTLASS: {why_not_built('cutlass')}")
    return Support(True, "product and statistics in one kernel made with CUTLASS")


def cutlass_is_built() -> bool:
    """Tells whether the loaded extension has the kernel."""
    return hasattr(torch.ops.trl_fast, "fused_scores")


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
    tiles: CutlassTiles,
    *,
    vocab_size: int,
) -> None:
    """Does what the function of this name in kernels/linear_scores.py does.

    Its arguments are that one's but for these. transform: scale, softcap or 0, inv_temperature of LogitTransform;
    kept: (N, V) int16 takes words, with tops (N, parts) float32; float32 takes the product as it is, without tops.
    """
    num_rows, num_parts = hidden.shape[0], -(-vocab_size // tiles.columns)
    if num_rows == 0:
        return
    ops = torch.ops.trl_fast
    parts = torch.empty(2 + outputs.bit_count(), num_parts, num_rows, dtype=torch.float32, device=hidden.device)
    start = 0
    for weight in weights:
        stop = start + weight.shape[0]
        # Columns are counted from the slice's first one.
        own_bias = None if bias is None else bias[start:stop]
        own_kept = None if kept is None else kept[:, start:stop]
        own_parts = parts[:, start // tiles.columns :]
        given = (hidden, weight, targets - start, own_bias, *transform, outputs)
        ops.fused_scores(*given, own_parts, state, own_kept)
        start = stop
    ops.merge_parts(parts, outputs, state, tops)
