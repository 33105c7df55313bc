"""The two row kernels: the PyTorch reference, which is their specification, and the table of implementations.

Both work on a block of logits that fits the workspace. `row_scores` turns rows into statistics; `row_grad` turns them
into gradients, given four coefficients a row, which is enough for every loss that this project has:

    p = exp(u - lse);   du = p * (a + b * (u - lse)) + e + d * onehot(target)

| gradient of | a | b | d | e |
|---|---|---|---|---|
| log-prob, upstream g | -g | 0 | g | 0 |
| entropy H, upstream g | -g H | -g | 0 | 0 |
| log-sum-exp, upstream g | g | 0 | 0 | 0 |
| mean logit, upstream g | 0 | 0 | 0 | g / V |

A float32 log-sum-exp of 10000 is off by up to 5e-4, and every probability with it. `with_low_part` puts what the
rounding lost back, by way of a and b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .scores import (
    ENTROPY,
    ENTROPY_ROW,
    IS_TOP1,
    IS_TOP1_ROW,
    LOG_SUM_SQ_PROBS,
    LOG_SUM_SQ_ROW,
    LOGPROB_ROW,
    LSE_LOW_ROW,
    LSE_ROW,
    MEAN_LOGITS,
    MEAN_LOGITS_ROW,
    NUM_STATISTICS,
)
from .transform import LogitTransform


class RowKernels(NamedTuple):
    """One implementation of both row kernels; the signatures are those of the references below."""

    scores: Callable[..., torch.Tensor]
    grad: Callable[..., None]
    # Temporaries beyond the block itself, in bytes an element: what the workspace has to leave room for.
    bytes_per_element: int


def with_low_part(coefficients: torch.Tensor, lse_low: torch.Tensor) -> torch.Tensor:
    """Coefficients (4, R) for lse as they must be for the exact log-sum-exp, lse + lse_low.

    p (a + b (u - lse - low)) with p = exp(u - lse) exp(-low): both factors go into a and b.
    """
    a, b, d, e = coefficients
    factor = torch.exp(-lse_low)
    return torch.stack((factor * (a - b * lse_low), factor * b, d, e))


def row_scores_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
) -> torch.Tensor:
    """Statistics of each row of a block of raw logits.

    Args:
        logits: (R, V) float32|bfloat16|float16 (float64 gives the float64 reference), rows may be strided.
        targets: (R,) int64 in [0, V).
        bias: (V,) or None, added first.
        scale, softcap, inv_temperature: see LogitTransform.
        outputs: mask of ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1.

    Returns:
        (7, R) float32: lse, logprob, entropy, log of the sum of squared probabilities, mean logit, 1.0 where the
        target is the first argmax, and what rounding lse to float32 lost. Rows that were not asked for are NaN.
    """
    u, _ = LogitTransform(scale, softcap, inv_temperature).apply(logits, bias)
    stats = u.new_full((NUM_STATISTICS, u.shape[0]), float("nan"))
    if u.shape[0] == 0:
        return stats
    # log_softmax and not u - lse: with a large common offset, lse itself is rounded too coarsely.
    logp = u.log_softmax(dim=-1)
    top = u.amax(dim=-1)
    log_sum = -logp.amax(dim=-1)
    lse = top + log_sum
    stats[LSE_ROW] = lse
    stats[LSE_LOW_ROW] = torch.where(torch.isfinite(lse), (top - lse) + log_sum, 0.0)
    stats[LOGPROB_ROW] = logp.gather(1, targets[:, None]).squeeze(1)
    if outputs & IS_TOP1:
        stats[IS_TOP1_ROW] = (u.argmax(dim=-1) == targets).to(u.dtype)
    if outputs & MEAN_LOGITS:
        stats[MEAN_LOGITS_ROW] = u.mean(dim=-1)
    if outputs & LOG_SUM_SQ_PROBS:
        stats[LOG_SUM_SQ_ROW] = torch.logsumexp(2 * logp, dim=-1)
    if outputs & ENTROPY:
        p = logp.exp()
        stats[ENTROPY_ROW] = -torch.where(p > 0, p * logp, 0.0).sum(dim=-1)
    return stats


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
    """Gradient with respect to the raw logits of columns [column_offset, column_offset + C), written to `out`.

    Args:
        logits: (R, C) float32|bfloat16|float16, rows may be strided.
        targets: (R,) int64, columns of the full vocabulary.
        bias: (C,) or None, the slice that belongs to these columns.
        lse: (R,) float32, the row's log-sum-exp over the full vocabulary.
        coefficients: (4, R) float32, the rows a, b, d, e of the module's formula.
        out: (R, C), dtype of logits; may be the very memory of logits.
    """
    u, tanh = LogitTransform(scale, softcap, inv_temperature).apply(logits, bias)
    a, b, d, e = (row[:, None].to(u.dtype) for row in coefficients)
    logp = u - lse[:, None].to(u.dtype)
    p = logp.exp()
    du = torch.where(p > 0, p * (a + b * logp), 0.0) + e
    local = targets - column_offset
    inside = (local >= 0) & (local < u.shape[1])
    column = local.clamp(0, max(u.shape[1] - 1, 0))[:, None]
    du.scatter_add_(1, column, torch.where(inside[:, None], d, 0.0))
    du *= inv_temperature * scale
    if tanh is not None:
        du *= 1 - tanh.square()
    out.copy_(du)


def _triton_scores(*args: object) -> torch.Tensor:
    from trl_fast.kernels.rows import row_scores

    return row_scores(*args)


def _triton_grad(*args: object) -> None:
    from trl_fast.kernels.rows import row_grad

    row_grad(*args)


def _cpp_scores(*args: object) -> torch.Tensor:
    return torch.ops.trl_fast.row_scores(*args)


def _cpp_grad(*args: object) -> None:
    torch.ops.trl_fast.row_grad(*args)


ROW_KERNELS = {
    "torch": RowKernels(row_scores_reference, row_grad_reference, 24),
    "cpp": RowKernels(_cpp_scores, _cpp_grad, 0),
    "triton": RowKernels(_triton_scores, _triton_grad, 0),
}


def register_fakes() -> None:
    """Shapes of the C++ ops for FakeTensor and torch.compile; called once, after the extension is loaded."""

    @torch.library.register_fake("trl_fast::row_scores")
    def _(logits, targets, bias, scale, softcap, inv_temperature, outputs):
        return logits.new_empty((NUM_STATISTICS, logits.shape[0]), dtype=torch.float32)

    @torch.library.register_fake("trl_fast::row_grad")
    def _(logits, targets, bias, scale, softcap, inv_temperature, lse, coefficients, column_offset, out):
        return None
