"""Computes the step of importance-weighted on-policy distillation: a policy gradient by a teacher's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_fast.losses.iw_opd import IWOPDInputs, IWOPDLossConfig, iw_opd_loss, iw_opd_metrics
from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.scoring import score
from trl_fast.ops import HeadOptions
from trl_fast.ops.token_scores import required

from ..base.step import StepResult, router_keywords, with_router_loss
from .step import DistillationUpdate


@dataclass(frozen=True)
class IWOPDUpdate(DistillationUpdate):
    """Holds a micro-batch of S completions.

    - `lengths`: their tokens, on the host; `rollout_logprobs` (N,) as in `IWOPDInputs`.
    - `teacher_logprobs` (N,) float32: what a server said; None: the teacher is here.
    """

    lengths: tuple[int, ...]
    teacher_logprobs: torch.Tensor | None = None
    rollout_logprobs: torch.Tensor | None = None

    def inputs(self, teacher_logprobs: torch.Tensor) -> IWOPDInputs:
        """Returns what the loss reads, with the teacher's log-probabilities (N,)."""
        given = (self.batch.branch, len(self.lengths), self.weights, teacher_logprobs, self.rollout_logprobs)
        return IWOPDInputs(*given)


def iw_opd_step(
    model: Callable[..., Any],
    update: IWOPDUpdate,
    teacher_logprobs: torch.Tensor,
    config: IWOPDLossConfig,
    *,
    head: HeadOptions,
    temperature: float = 1.0,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of one micro-batch, and its metrics.

    Args:
        model: the student, with `modeling.scoring.attach_scoring`, as it is called.
        update: the micro-batch, on the student's device.
        teacher_logprobs: (N,), the teacher's of the same tokens.
        config: the loss.
        head: the user's settings of the head.
        temperature: divides the student's logits.
        router_coef: weight of a mixture of experts' load-balancing loss.
        loss_divisor: accumulation steps that the router's loss is divided by.
        keywords: go to the student's forward.
    """
    inputs = update.inputs(teacher_logprobs)
    scored = score(
        model,
        update.batch,
        outputs=("logprobs", "entropy"),
        temperature=temperature,
        token_loss=lambda scores, rows: iw_opd_loss(scores, inputs, config, rows=rows),
        group_sizes=update.lengths,
        head=head,
        **{**router_keywords(router_coef), **keywords},
    )
    assert scored.loss is not None, "a token loss was asked for"
    loss, metrics = with_router_loss(scored.loss, scored, router_coef, loss_divisor)
    counts = update.weights != 0
    entropy = Metric(torch.where(counts, required(scored.tokens.entropy), 0.0).sum(), counts.sum().float())
    return StepResult(loss, {"entropy": entropy, **iw_opd_metrics(scored.tokens, inputs, config), **metrics})
