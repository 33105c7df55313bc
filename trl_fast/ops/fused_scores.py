"""Scores without gradient by one kernel, product and row statistics together; its logits never reach memory.

The usual way is two steps: a library's product writes a tile of logits, a row kernel reads it again. The larger the
hidden size, the less that traffic counts next to the product, and a library's product is faster than ours. So the
fused kernel is for small heads, and `fused_is_faster` says by arithmetic how small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from .backends import supports
from .rows import BEFORE, NUM_STATES, SUM, SUM_SQ, SUM_X, TARGET, TOP, TOTAL, new_state
from .scores import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS
from .transform import LogitTransform

if TYPE_CHECKING:
    from trl_fast.kernels.linear_scores import Tiles

# Bytes that a row takes in each split: its state in float32, and what merging it in float64 takes at most.
_BYTES_PER_STATE = 128


class Gpu(NamedTuple):
    """What a GPU does in a second. Nothing here was measured by us.

    product: operations of a library's 16-bit matrix product: estimated as 77% of the data sheet's dense peak.
    memory: bytes from or to memory, by the data sheet.
    cache: bytes from the second-level cache: an estimate.
    scalar: float32 instructions, by the data sheet (which counts two operations for one).
    """

    product: float
    memory: float
    cache: float
    scalar: float


# By compute capability: A100 80 GB, H100 SXM, B200.
GPUS = {
    (8, 0): Gpu(240e12, 2.0e12, 4.5e12, 9.7e12),
    (9, 0): Gpu(760e12, 3.35e12, 5.5e12, 33.5e12),
    (10, 0): Gpu(1730e12, 8.0e12, 10e12, 37.5e12),
}
# An estimate: of a library's rate, what the fused kernel's product has when nothing else holds it up.
FUSED_PRODUCT_SHARE = 0.85
# Counted in the machine code of the fused kernel for log-probs, outside of its product: 14 to 18.
INSTRUCTIONS_PER_LOGIT = 17


def fused_is_faster(hidden_size: int, logit_bytes: int, tile_rows: int, tile_columns: int, gpu: Gpu) -> bool:
    """Whether the fused kernel should take less time than a product and a row kernel, by the estimates above.

    Per logit, with H the hidden size:

        two steps:  2 H / product  +  2 logit_bytes / memory
        fused:      max(2 H / (share · product), 2 H (1 / tile_rows + 1 / tile_columns) / cache)
                    +  instructions / scalar

    Two steps write a logit of `logit_bytes` and read it once. The fused kernel does neither, but its product is
    slower: each tile of logits reads its rows of both factors, two bytes a number, from the cache, and the tensor
    cores wait while its logits are added up. Reading the weight from memory is the same for both and left out.
    """
    operations = 2 * hidden_size
    two_steps = operations / gpu.product + 2 * logit_bytes / gpu.memory
    from_cache = 2 * hidden_size * (1 / tile_rows + 1 / tile_columns) / gpu.cache
    fused = max(operations / (FUSED_PRODUCT_SHARE * gpu.product), from_cache) + INSTRUCTIONS_PER_LOGIT / gpu.scalar
    return fused < two_steps


def _tiles(device: torch.device) -> Tiles:
    """The kernel's configuration for this GPU; in the interpreter any will do."""
    from trl_fast.kernels.linear_scores import TILES

    return TILES[torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)]


def can_fuse(backend: str, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a fused kernel for this head, given the dtype in which products are computed.

    weight: (V, H). The kernel multiplies 16-bit numbers: a float32 product takes so long that its logits' traffic does
    not count. It also runs in Triton's interpreter, for tests.
    """
    if backend not in ("cuda", "triton") or not supports("linear_logprob", "triton", weight.device, dtype).ok:
        return False
    if dtype not in (torch.bfloat16, torch.float16) or weight.dtype != dtype or weight.stride(1) != 1:
        return False
    return weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) in GPUS


def serves_fused(backend: str, weight: torch.Tensor, dtype: torch.dtype, logit_bytes: int) -> bool:
    """Whether the fused kernel is to score: it can, and should be faster. In the interpreter it always serves."""
    if not can_fuse(backend, weight, dtype):
        return False
    if weight.device.type != "cuda":
        return True
    tiles, gpu = _tiles(weight.device), GPUS[torch.cuda.get_device_capability(weight.device)]
    return fused_is_faster(weight.shape[1], logit_bytes, tiles.rows, tiles.columns, gpu)


def merge_states(parts: torch.Tensor, owner: torch.Tensor, outputs: int) -> torch.Tensor:
    """The state (7, R) float64 of rows.py from its parts (S, 7, R) by splits of the vocabulary.

    owner: (R,) int64, the split that has the row's target. Sums that `outputs` does not ask for are not read.
    """
    state = new_state(parts.shape[2], parts.device)
    top, sums = parts[:, TOP].double(), parts[:, SUM].double()
    state[TOP] = top.amax(dim=0)
    # A split in which everything is -inf has sums of 0, whatever they are multiplied by.
    shift = torch.where(top == float("-inf"), 0.0, top - state[TOP])
    factor = shift.exp()
    state[SUM] = (factor * sums).sum(dim=0)
    state[TARGET] = parts[:, TARGET].gather(0, owner[None]).squeeze(0).double()
    if outputs & ENTROPY:
        state[SUM_X] = (factor * (parts[:, SUM_X] + shift * sums)).sum(dim=0)
    if outputs & LOG_SUM_SQ_PROBS:
        state[SUM_SQ] = (factor.square() * parts[:, SUM_SQ]).sum(dim=0)
    if outputs & MEAN_LOGITS:
        state[TOTAL] = parts[:, TOTAL].sum(dim=0, dtype=torch.float64)
    if outputs & IS_TOP1:
        state[BEFORE] = parts[:, BEFORE].amax(dim=0).double()
    return state


def score_rows_fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    state: torch.Tensor,
    workspace_bytes: int,
) -> None:
    """Writes the state (7, N) float64 of all rows after all columns, by the fused kernel.

    hidden: (N, H), weight: (V, H), both of the same dtype; targets: (N,) int64; bias: (V,) or None.
    """
    from trl_fast.kernels.linear_scores import COLUMNS_PER_SPLIT, num_splits, partial_states

    tiles = _tiles(weight.device)
    # A target outside the vocabulary stays NaN, as in the row kernels.
    inside = targets.clamp(0, weight.shape[0] - 1)
    splits, num_rows = num_splits(weight.shape[0]), hidden.shape[0]
    step = max(1, workspace_bytes // (splits * _BYTES_PER_STATE))
    for start in range(0, num_rows, step):
        rows = slice(start, min(start + step, num_rows))
        parts = torch.empty(splits, NUM_STATES, rows.stop - start, dtype=torch.float32, device=weight.device)
        partial_states(hidden[rows], weight, targets[rows], bias, *transform, outputs, parts, tiles)
        state[:, rows] = merge_states(parts, inside[rows] // COLUMNS_PER_SPLIT, outputs)
    state[TARGET].masked_fill_(inside != targets, float("nan"))
