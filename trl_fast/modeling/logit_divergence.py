"""Computes divergences of logits that are whole already, for models whose head is not understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trl_fast.ops.divergence.row_kernels import DIVERGENCE_ROW, ENTROPY_ROW, NUM_RESULTS
from trl_fast.ops.linear_divergence import DivergenceLoss, DivergenceScores

# Rows of a model's own logits whose temporaries are there at once.
_ROWS_OF_LOGITS = 64


# From rows (R,) int64, the student's logits of them (R, V), which it may change, and weights (R,), it writes results
# (3, R) and a gradient (R, V) or none: as in divergence/row_kernels.py.
Compare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


def logit_divergence(
    logits: torch.Tensor, weights: torch.Tensor, vocab_size: int | None, compare: Compare
) -> DivergenceLoss:
    """Returns Σ weight · divergence, 0-d and differentiable, with the scores of the rows.

    logits: (N, V); weights: (N,) float32, rows of weight 0 are left out; vocab_size: columns from there on do not
    count, None: all count; compare: computes some rows.
    """
    loss, results = _LogitDivergence.apply(logits, weights, vocab_size, compare)
    return DivergenceLoss(loss, DivergenceScores(results[DIVERGENCE_ROW], results[ENTROPY_ROW]))


class _LogitDivergence(torch.autograd.Function):
    """Computes Σ weight · divergence with the gradient, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, weights: torch.Tensor, vocab_size: int | None, compare: Compare
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = slice(vocab_size)
        results = torch.zeros(NUM_RESULTS, len(student), dtype=torch.float32, device=student.device)
        gradient: Any = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for rows in torch.nonzero(weights).squeeze(1).split(_ROWS_OF_LOGITS):
            found, part = results.new_empty(NUM_RESULTS, len(rows)), student[rows, known]
            changed: Any = None if gradient is None else torch.empty_like(part)
            compare(rows, part, weights[rows], found, changed)
            results[:, rows] = found
            if gradient is not None:
                gradient[rows, known] = changed
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(results)
        return (results[DIVERGENCE_ROW] * weights).sum(), results

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad_loss.to(gradient.dtype), None, None, None
