"""Scores tokens with a trained head whose weight several processes hold in parts.

It is linear_scores with another end: the gradient of the weight is summed over the processes a vocabulary tile at a
time, and reaches autograd as that of the rows that this process holds.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..named_gradients import AutogradContext, first_derivative, gradients_of, needs_gradients
from ..validation import check_head_call
from .autograd import DifferentiableScores, differentiable_scores, linear_scores, planned_head
from .gradients import Needs, head_gradients
from .kept_logits import KeptLogits
from .logit_transform import LogitTransform
from .plan import LOGITS, HeadOptions
from .row_statistics import LSE_ROW, row_coefficients
from .weight_shard import ShardedGradient, WeightShard


def sharded_scores(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    options: HeadOptions,
    trained: WeightShard,
) -> DifferentiableScores:
    """Scores the targets (N,) of hidden (N, H) as `differentiable_scores` does, with a gradient for the rows trained.

    weight: (V, H), whole; bias: (V,) or None; trained: the rows that this process trains. They get the gradient, and
    the weight gets none; a sparse estimate is the weight's.

    Raises:
        ValueError, RuntimeError: as in linear_logprob.
    """
    if options.head_grad != "exact":
        return differentiable_scores(op, hidden, weight, targets, bias, transform, outputs, options)
    facts = device_facts(hidden.device)
    workspace_bytes = options.workspace_on(hidden.device, facts)
    hidden = check_head_call(hidden, weight, targets, bias)
    backend = choose_backend(op, options.backend, facts, hidden.dtype)
    given = (hidden, trained.rows, weight, targets.long(), bias, trained)
    return DifferentiableScores(*_ShardedScores.apply(*given, transform, outputs, workspace_bytes, backend))


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside tensors."""

    trained: WeightShard
    transform: LogitTransform
    options: tuple[int, str]


class _ShardedScores(torch.autograd.Function):
    """Computes what linear_scores does, and the gradient of the rows that this process holds.

    Every process has to run backward. It is no torch.library op, because those take no processes.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        trained: WeightShard,
        transform: LogitTransform,
        outputs: int,
        workspace_bytes: int,
        backend: str,
    ) -> tuple[torch.Tensor, ...]:
        """Returns lse, logprobs, entropy, mean_logits (N,) and all statistics (7, N).

        hidden: (N, H); rows: (S, H), those trained; weight: (V, H), whole in forward and in backward, which belongs to
        the engine that gathers it; targets: (N,) int64; bias: (V,) or None.
        """
        given = (hidden, weight, targets, bias, *transform, outputs, LOGITS, workspace_bytes, backend)
        *scores, statistics, cache, tops = linear_scores(*given)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, bias, statistics.clone(), cache, tops)
        ctx.trained, ctx.transform, ctx.options = trained, transform, (workspace_bytes, backend)
        ctx.mark_non_differentiable(statistics)
        return (*scores, statistics)

    @staticmethod
    @first_derivative("the head (linear_logprob)")
    def backward(
        ctx: _Context,
        grad_lse: torch.Tensor | None,
        grad_logprobs: torch.Tensor | None,
        grad_entropy: torch.Tensor | None,
        grad_mean_logits: torch.Tensor | None,
        _: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of hidden (N, H), of the rows trained (S, H) and of the bias (V,)."""
        hidden, weight, targets, bias, statistics, cache, tops = ctx.saved_tensors
        coefficients = row_coefficients(
            statistics,
            weight.shape[0],
            grad_lse=grad_lse,
            grad_logprobs=grad_logprobs,
            grad_entropy=grad_entropy,
            grad_mean_logits=grad_mean_logits,
        )
        names = ("hidden", "rows", "bias")
        needs = Needs(*needs_gradients(ctx, _ShardedScores.forward, *names))
        with torch.autocast(hidden.device.type, enabled=False):
            head = planned_head(hidden, weight, bias, ctx.transform, LOGITS, *ctx.options)
            kept = KeptLogits(cache, tops if len(tops) else None, head.plan.kept_columns, head.plan.chunk)
            total = ShardedGradient(ctx.trained, head.plan.sum_dtype, weight.device)
            given = (hidden, targets, statistics[LSE_ROW], coefficients, kept, total)
            grad_hidden, _, grad_bias = head_gradients(head, needs, *given)
        found = zip(names, (grad_hidden, total.result(), grad_bias), needs, strict=True)
        return gradients_of(_ShardedScores.forward, **{name: each for name, each, needed in found if needed})
