"""Specifies the two row kernels by their PyTorch reference, and holds the table of their implementations.

Both work on a tile: some rows, and columns [column_offset, column_offset + C) of the vocabulary. `row_scores` adds a
tile to each row's running state, relative to the largest logit so far (online softmax, Milakov and Gimelshein, arXiv
1805.02867), so that the rest of the row need not exist; `finish_scores` of sweep.py turns the state into statistics.
Its sums leave the target out, whose logit is kept apart (row_statistics.py says why). `row_grad` turns a tile into its
gradient, given four coefficients a row, which is enough for every loss that this project has:

    p = exp(u - lse);   du = p * (a + b * (u - lse)) + e, but d at the target

| gradient of | a | b | d | e |
|---|---|---|---|---|
| log-prob, upstream g | -g | 0 | g (1 - p_t) | 0 |
| entropy H, upstream g | -g H | -g | -g p_t (log p_t + H) | 0 |
| log-sum-exp, upstream g | g | 0 | g p_t | 0 |
| mean logit, upstream g | 0 | 0 | g / V | g / V |

`row_coefficients` of row_statistics.py computes them: d in closed form, since g - g p_t would lose what is left of a
target that the model is sure of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..device import device_facts
from .kept_logits import CHUNK, pack, unpack
from .logit_transform import LogitTransform
from .row_statistics import (
    BEFORE,
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGITS,
    SUM,
    SUM_SQ,
    SUM_X,
    TARGET,
    TOP,
    TOTAL,
)


class RowKernels(NamedTuple):
    """Holds one implementation of both row kernels; the signatures are those of the references below."""

    scores: Callable[..., None]
    grad: Callable[..., None]
    # Temporaries beyond the tile itself, in bytes an element: what the workspace has to leave room for.
    bytes_per_element: int
    # Both in one read, as `row_lse_gradient_by_two` below; None: by the two others.
    lse_gradient: Callable[..., None] | None = None
    # The same of packed logits (kept_logits.py); None: logits are kept as they are.
    scores_packed: Callable[..., None] | None = None
    grad_packed: Callable[..., None] | None = None


def _local_targets(targets: torch.Tensor, column_offset: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the columns of the targets in a tile, clamped into it (R,), and whether they lie in it (R,) bool."""
    local = targets - column_offset
    return local.clamp(0, max(columns - 1, 0)), (local >= 0) & (local < columns)


def _without_target(u: torch.Tensor, local: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Returns logits u (R, C) with -inf at the targets that lie in the tile: a class that is not there."""
    kept = u.gather(1, local[:, None])
    return u.scatter(1, local[:, None], kept.masked_fill(inside[:, None], float("-inf")))


def row_scores_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
) -> None:
    """Adds a tile of raw logits to the state of its rows.

    Args:
        logits: (R, C) float32|bfloat16|float16 (float64 gives the float64 reference), rows may be strided.
        targets: (R,) int64, columns of the full vocabulary.
        bias: (C,) or None, the slice that belongs to these columns; it is added first.
        scale, softcap, inv_temperature: see LogitTransform.
        outputs: mask of ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1: which sums are kept up besides SUM.
        column_offset: the tile's first column in the vocabulary; tiles come in order.
        state: (7, R) float64, changed in place.
    """
    u, _ = LogitTransform(scale, softcap, inv_temperature).apply(logits, bias)
    if u.numel() == 0:
        return
    local, inside = _local_targets(targets, column_offset, u.shape[1])
    target_logits = u.gather(1, local[:, None]).squeeze(1)
    state[TARGET] = torch.where(inside, target_logits.to(state.dtype), state[TARGET])
    if outputs & MEAN_LOGITS:
        state[TOTAL] += u.sum(dim=1)
    u = _without_target(u, local, inside)
    before = state[TOP].clone()
    top = torch.maximum(before, u.amax(dim=1).to(state.dtype))
    # While everything is -inf, subtract 0: -inf - -inf would be NaN.
    anchor = torch.where(top == float("-inf"), 0.0, top)
    shift = torch.where(before == float("-inf"), 0.0, before - anchor)
    factor = shift.exp()
    x = u - anchor[:, None].to(u.dtype)
    e = x.exp()
    if outputs & ENTROPY:
        moment = torch.where(e > 0, e * x, e).sum(dim=1)
        state[SUM_X] = factor * (state[SUM_X] + shift * state[SUM]) + moment
    if outputs & LOG_SUM_SQ_PROBS:
        state[SUM_SQ] = factor.square() * state[SUM_SQ] + e.square().sum(dim=1)
    if outputs & IS_TOP1:
        columns = column_offset + torch.arange(u.shape[1], device=u.device)
        earlier = u.masked_fill(columns >= targets[:, None], float("-inf")).amax(dim=1)
        state[BEFORE] = torch.maximum(state[BEFORE], earlier.to(state.dtype))
    state[SUM] = factor * state[SUM] + e.sum(dim=1)
    state[TOP] = top


def row_grad_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    column_offset: int,
    out: torch.Tensor,
) -> None:
    """Computes the gradient of the raw logits of columns [column_offset, column_offset + C), written to `out`.

    Args:
        logits: (R, C) float32|bfloat16|float16, rows may be strided.
        targets: (R,) int64, columns of the full vocabulary.
        bias: (C,) or None, the slice that belongs to these columns.
        lse: (R,) float32, the row's log-sum-exp over the full vocabulary.
        coefficients: (4, R) float32, the rows a, b, d, e of the module's formula.
        out: (R, C), dtype of logits; may be the very memory of logits. On a GPU, float32 logits may have a narrower
            one.
    """
    u, cap_derivative = LogitTransform(scale, softcap, inv_temperature).apply(logits, bias)
    a, b, d, e = (row[:, None].to(u.dtype) for row in coefficients)
    logp = u - lse[:, None].to(u.dtype)
    p = logp.exp()
    du = torch.where(p == 0, 0.0, p * (a + b * logp)) + e
    local, inside = _local_targets(targets, column_offset, u.shape[1])
    if du.numel():
        du.scatter_(1, local[:, None], torch.where(inside[:, None], d, du.gather(1, local[:, None])))
    du *= inv_temperature * scale
    if cap_derivative is not None:
        du *= cap_derivative
    out.copy_(du)


def row_lse_gradient_by_two(
    kernels: RowKernels,
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Adds a tile to its rows' state, and writes e^(u - m) du/dz to `out` (R, C), but 0 at the target.

    m is the largest logit of the other classes so far. The arguments are those of row_scores_reference; `out` is as
    for row_grad_reference.
    """
    given = (logits, targets, bias, scale, softcap, inv_temperature)
    kernels.scores(*given, outputs, column_offset, state)
    # The gradient's formula with m in the place of the log-sum-exp; while everything is -inf, 0 is subtracted.
    top = state[TOP]
    anchor = torch.where(top == float("-inf"), 0.0, top).to(torch.promote_types(logits.dtype, torch.float32))
    ones = anchor.new_zeros(4, logits.shape[0])
    ones[0] = 1.0
    kernels.grad(*given, anchor, ones, column_offset, out)


def row_scores_packed_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    inv_temperature: float,
    outputs: int,
    column_offset: int,
    state: torch.Tensor,
    words: torch.Tensor,
    tops: torch.Tensor,
) -> None:
    """Adds a tile to the state of its rows, as row_scores does without a softcap, and packs its logits.

    The target is packed as -inf: its gradient needs no logit, and a chunk's words reach below the largest other one.

    Args:
        logits, targets, bias, scale, inv_temperature, outputs, column_offset, state: as in row_scores_reference. On a
            CPU, compiled kernels take float32 logits only.
        words: (R, >= C) int16, tops: (R, >= num_chunks(C)) float32, filled as kept_logits.py says.
    """
    row_scores_reference(logits, targets, bias, scale, 0.0, inv_temperature, outputs, column_offset, state)
    u, _ = LogitTransform(scale, 0.0, inv_temperature).apply(logits, bias)
    if u.numel():
        u = _without_target(u, *_local_targets(targets, column_offset, u.shape[1]))
    pack(u.float(), words, tops)


def row_grad_packed_reference(
    words: torch.Tensor,
    index: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    inv_temperature: float,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    column_offset: int,
    out: torch.Tensor,
    tops: torch.Tensor,
    chunk: int = CHUNK,
) -> None:
    """Computes the gradient of the raw logits of a tile (R, C) that was packed, written to `out`.

    Args:
        words: (K, >= C) int16, tops: (K, >= num_chunks(C, chunk)) float32, as row_scores_packed filled them; chunk:
            columns of a chunk, which only PyTorch and Triton let others choose.
        index: (R,) int64, the rows of `words` that belong to the tile's rows; None for all in order. On a GPU nothing
            checks its range.
        targets, scale, inv_temperature, lse, coefficients, column_offset: as in row_grad_reference.
        out: (R, C) float32, on a GPU bfloat16 and float16 too. Where these are 16 bits wide and `index` is None, it
            may be the words' own memory, with their stride.
    """
    if out.numel() == 0:
        return
    if index is not None:
        words, tops = words[index], tops[index]
    du = unpack(words[:, : out.shape[1]], tops, chunk)
    row_grad_reference(du, targets, None, 1.0, 0.0, 1.0, lse, coefficients, column_offset, du)
    out.copy_(du.mul_(scale * inv_temperature))


def _triton_scores(*args: object) -> None:
    from trl_fast.kernels.row_kernels import row_scores

    row_scores(*args)


def _triton_grad(*args: object) -> None:
    from trl_fast.kernels.row_kernels import row_grad

    row_grad(*args)


def _triton_scores_packed(*args: object) -> None:
    from trl_fast.kernels.row_kernels import row_scores_packed

    row_scores_packed(*args)


def _triton_grad_packed(*args: object) -> None:
    from trl_fast.kernels.row_kernels import row_grad_packed

    row_grad_packed(*args)


# The compiled ops serve CPU and CUDA tensors, each with its own kernels.
def _compiled_scores(*args: object) -> None:
    torch.ops.trl_fast.row_scores(*args)


def _cpp_lse_gradient(*args: object) -> None:
    torch.ops.trl_fast.row_weights(*args)


def _compiled_grad(*args: object) -> None:
    torch.ops.trl_fast.row_grad(*args)


def _compiled_scores_packed(*args: object) -> None:
    torch.ops.trl_fast.row_scores_packed(*args)


def _compiled_grad_packed(*args: object) -> None:
    torch.ops.trl_fast.row_grad_packed(*args)


ROW_KERNELS = {
    "torch": RowKernels(row_scores_reference, row_grad_reference, 24),
    "cpp": RowKernels(
        _compiled_scores, _compiled_grad, 0, _cpp_lse_gradient, _compiled_scores_packed, _compiled_grad_packed
    ),
    "cuda": RowKernels(_compiled_scores, _compiled_grad, 0, None, _compiled_scores_packed, _compiled_grad_packed),
    "triton": RowKernels(_triton_scores, _triton_grad, 0, None, _triton_scores_packed, _triton_grad_packed),
}


def row_kernels(backend: str, device: torch.device) -> RowKernels:
    """Returns a backend's kernels, or those that stand in for them on a simulated device."""
    return device_facts(device).row_kernels or ROW_KERNELS[backend]
