"""Scores tokens with a head whose weight is whole only while a pass runs (transient_weight.py).

It is linear_scores that keeps no weight for its backward pass, and gives the weight's gradient, a vocabulary tile at a
time, to what the weight is made of: the part that this process holds, or an adapter's factors.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..named_gradients import AutogradContext, first_derivative
from ..validation import check_head_call
from .autograd import DifferentiableScores, differentiable_scores, linear_scores, planned_head, what_to_keep
from .gradients import Needs, head_gradients
from .kept_logits import KeptLogits
from .logit_transform import LogitTransform
from .plan import LOGITS, NOTHING, UNIT_GRADIENT, HeadOptions
from .row_statistics import LSE_ROW, Upstream
from .transient_weight import TransientWeight


def transient_scores(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    options: HeadOptions,
    source: TransientWeight,
) -> DifferentiableScores:
    """Scores the targets (N,) of hidden (N, H) as `differentiable_scores` does; the gradient is the source's.

    weight: (V, H), what the source gives in this pass; bias: (V,) or None. A sparse estimate of the gradient is the
    whole weight's.

    Raises:
        ValueError, RuntimeError: as in linear_logprob.
    """
    trains = any(parameter.requires_grad for parameter in source.parameters)
    keep = what_to_keep(hidden, trains or (bias is not None and bias.requires_grad))
    if keep == NOTHING or options.head_grad != "exact":
        if keep != NOTHING:
            # What is kept of a frozen one is a copy: the engine may free its own.
            weight = source.whole() if trains else source.whole().clone()
        return differentiable_scores(op, hidden, weight, targets, bias, transform, outputs, options)
    facts = device_facts(hidden.device)
    workspace_bytes = options.workspace_on(hidden.device, facts)
    hidden = check_head_call(hidden, weight, targets, bias)
    backend = choose_backend(op, options.backend, facts, hidden.dtype)
    given = (hidden, targets.long(), bias, weight.detach(), source, transform, outputs)
    return DifferentiableScores(*_TransientScores.apply(*given, (keep, workspace_bytes, backend), *source.parameters))


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside tensors."""

    source: TransientWeight
    transform: LogitTransform
    options: tuple[int, int, str]
    vocab_size: int


class _TransientScores(torch.autograd.Function):
    """Computes what linear_scores does, and the gradients of the weight's parameters.

    Every process has to run backward. It is no torch.library op, because those take no functions and processes.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None,
        weight: torch.Tensor,
        source: TransientWeight,
        transform: LogitTransform,
        outputs: int,
        options: tuple[int, int, str],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Returns lse, logprobs, entropy, mean_logits (N,) and all statistics (7, N).

        hidden: (N, H); targets: (N,) int64; bias: (V,) or None; weight: (V, H), which is not kept; options: what is
        kept of the logits, the bytes of the workspace, the backend; parameters: those of the source.
        """
        *scores, statistics, cache, tops = linear_scores(hidden, weight, targets, bias, *transform, outputs, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, targets, bias, statistics.clone(), cache, tops)
        ctx.source, ctx.transform, ctx.options, ctx.vocab_size = source, transform, options, weight.shape[0]
        ctx.mark_non_differentiable(statistics)
        return (*scores, statistics)

    @staticmethod
    @first_derivative("the head (linear_logprob)")
    def backward(ctx: _Context, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of hidden (N, H), of the bias (V,), and of the source's parameters, of any shapes."""
        hidden, targets, bias, statistics, cache, tops = ctx.saved_tensors
        keep, workspace_bytes, backend = ctx.options
        given = Upstream(*upstream[:4])
        nothing = (None,) * len(ctx.needs_input_grad[3:])
        coefficients = given.coefficients(statistics, ctx.vocab_size, keep == UNIT_GRADIENT)
        if coefficients is None:
            return (given.of_unit_gradient(cache, hidden.dtype), None, None, *nothing)
        weight = ctx.source.whole()
        needs = Needs(ctx.needs_input_grad[0], any(ctx.needs_input_grad[8:]), ctx.needs_input_grad[2])
        with torch.autocast(hidden.device.type, enabled=False):
            head = planned_head(hidden, weight, bias, ctx.transform, LOGITS, workspace_bytes, backend)
            logits = cache if keep == LOGITS else hidden.new_empty(0, 0, 0)
            kept = KeptLogits(logits, tops if len(tops) else None, head.plan.kept_columns, head.plan.chunk)
            total = ctx.source.gradient(head.plan.sum_dtype, weight.device) if needs.weight else None
            rows = (hidden, targets, statistics[LSE_ROW], coefficients, kept)
            grad_hidden, _, grad_bias = head_gradients(head, needs, *rows, total)
        return (
            grad_hidden if needs.hidden else None,
            None,
            grad_bias if needs.bias else None,
            *nothing[:5],
            *(nothing[5:] if total is None else total.results()),
        )
