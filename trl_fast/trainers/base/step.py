"""Defines what a training step gives back, and the part of a loss that all methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from trl_fast.losses.mean_metric import Metric
from trl_fast.modeling.scoring import ModelReading, ModelScores
from trl_fast.ops import TokenScores


@dataclass(frozen=True)
class StepResult:
    """Holds the outcome of one micro-batch.

    - `loss`: 0-d float32, differentiable.
    - `metrics`: (total, count) by name, 0-d and without gradient, in the order in which they are logged.
    - `scores`: the scored tokens' values, (N,) each, without gradient; None where the method scores no tokens.
    """

    loss: torch.Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    scores: TokenScores | None = None


def router_keywords(coefficient: float) -> dict[str, bool]:
    """Returns the keywords with which a mixture of experts computes its router's loss; none where it has no weight."""
    return {"output_router_logits": True} if coefficient else {}


def with_router_loss(
    loss: torch.Tensor, scored: ModelScores | ModelReading, coefficient: float, divisor: int = 1
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Adds the router's load-balancing loss to a loss, a scalar.

    Args:
        loss: a scalar, float32.
        scored: what the loss was computed from; `aux_loss` is the router's loss, or None.
        coefficient: the weight of the router's loss; 0 leaves it out.
        divisor: the accumulation steps, where the loss is divided by them already.

    Returns:
        The sum (0-d), and the metric aux_loss, if there is one.
    """
    if scored.aux_loss is None or not coefficient:
        return loss, {}
    total = loss + coefficient * scored.aux_loss / divisor
    return total, {"aux_loss": Metric(scored.aux_loss, torch.ones_like(scored.aux_loss))}


def insert_after(name: str, metrics: Mapping[str, Metric], more: Mapping[str, Metric]) -> dict[str, Metric]:
    """Returns `metrics` with `more` behind the metric `name`, so that logs keep TRL's order."""
    names = list(metrics)
    first = {key: metrics[key] for key in names[: names.index(name) + 1]}
    return {**first, **more, **{key: value for key, value in metrics.items() if key not in first}}
