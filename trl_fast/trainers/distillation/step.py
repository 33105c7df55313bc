"""Computes the step of distillation: a student's divergence from a teacher on the same rows of trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_fast.data import TokenBatch
from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.distillation import DivergenceSettings, ReadDivergence, teacher_states
from trl_fast.modeling.scoring import Reading, read_model
from trl_fast.ops import HeadOptions

from ..base.step import StepResult, router_keywords, with_router_loss


@dataclass(frozen=True)
class DistillationUpdate:
    """Holds a micro-batch: the tokens, and the weight (N,) float32 in the loss of each token; 0 where none counts."""

    batch: TokenBatch
    weights: torch.Tensor


def distillation_step(
    model: Callable[..., Any],
    teacher: Callable[..., Any],
    update: DistillationUpdate,
    settings: DivergenceSettings,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of one micro-batch, Σ weight · divergence, and the metric entropy.

    The teacher's backbone runs first and without gradient, on the same row: its prompts too are computed once.

    Args:
        model: the student, with `modeling.scoring.attach_scoring`, as it is called.
        teacher: the teacher, the same.
        update: the micro-batch, on both models' device.
        settings: what is compared.
        head: the user's settings of the head.
        router_coef: weight of a mixture of experts' load-balancing loss.
        loss_divisor: accumulation steps that the router's loss is divided by.
        keywords: go to the student's forward.
    """
    batch, weights = update.batch, update.weights
    reading = ReadDivergence(teacher_states(teacher, batch), weights, settings, head)
    return divergence_step(
        *(model, batch, weights, reading), router_coef=router_coef, loss_divisor=loss_divisor, **keywords
    )


def divergence_step(
    model: Callable[..., Any],
    batch: TokenBatch,
    weights: torch.Tensor,
    reading: Reading,
    *,
    router_coef: float,
    loss_divisor: int,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of a batch whose divergence `reading` reads, and the metric entropy.

    weights: (N,) float32, 0 where a token does not count; the others are those of `distillation_step`.
    """
    read = read_model(model, batch, reading, **router_keywords(router_coef), **keywords)
    found = read.value
    loss, metrics = with_router_loss(found.loss, read, router_coef, loss_divisor)
    counted = (weights != 0).sum().float()
    entropy = Metric(found.scores.entropy.sum(), counted)
    return StepResult(loss, {"entropy": entropy, **metrics})
