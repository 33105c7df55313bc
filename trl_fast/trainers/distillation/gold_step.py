"""Computes the step of distillation between models of one tokenizer or of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.distillation import DivergenceSettings, teacher_states
from trl_fast.modeling.scoring import read_model
from trl_fast.modeling.span_distance import ReadSpanDistance
from trl_fast.ops import HeadOptions

from ..base.step import StepResult, router_keywords, with_router_loss
from .cross_tokenizer import SpanUpdate
from .step import DistillationUpdate, distillation_step


def gold_step(
    model: Callable[..., Any],
    teacher: Callable[..., Any],
    update: SpanUpdate | DistillationUpdate,
    settings: DivergenceSettings,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of one micro-batch: that of `distillation_step`, whose arguments these are, or of spans.

    The latter is Σ weight · distance; the teacher reads a batch of its own, and of a hybrid there are metrics of its
    two parts.
    """
    options: dict[str, Any] = {"router_coef": router_coef, "loss_divisor": loss_divisor, **keywords}
    if isinstance(update, DistillationUpdate):
        return distillation_step(model, teacher, update, settings, head=head, **options)
    given = update.comparison
    reading = ReadSpanDistance(teacher_states(teacher, update.teacher_batch), given, head)
    read = read_model(model, update.batch, reading, **router_keywords(router_coef), **keywords)
    found = read.value
    loss, metrics = with_router_loss(found.loss, read, router_coef, loss_divisor)
    # The first part is the distance, which the loss tells.
    for name, part in zip(given.distance.names[1:], found.parts[1:], strict=True):
        metrics[f"{name}_loss"] = Metric.over((part * update.shares).sum(), update.completions)
    return StepResult(loss, metrics)
