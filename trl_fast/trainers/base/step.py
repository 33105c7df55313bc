"""What every method's step function returns, and the router's loss that each of them may add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from trl_fast.losses.mean_metric import Metric

# Keywords of `modeling.scoring.score` about the head: backend, workspace_bytes, head_grad.
HeadKeywords = Mapping[str, Any]


class StepResult(NamedTuple):
    """Holds what a step of one micro-batch gives: the loss (0-d float), and its metrics in TRL's order."""

    loss: torch.Tensor
    metrics: dict[str, Metric | tuple[torch.Tensor, torch.Tensor]]


def router_keywords(coefficient: float) -> dict[str, bool]:
    """Returns the keywords of a scoring call with which its `aux_loss` comes, where that has a weight."""
    return {"output_router_logits": True} if coefficient else {}


def add_router_loss(
    loss: torch.Tensor, aux_loss: torch.Tensor | None, coefficient: float, divisor: float = 1
) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Adds a mixture of experts' load-balancing loss to the method's.

    Args:
        loss: 0-d float.
        aux_loss: 0-d float, the model's load-balancing loss; None: it has none.
        coefficient: its weight; 0: it is not added.
        divisor: what its share is divided by, where the method's loss is divided already.

    Returns:
        The sum (0-d), and the metric `aux_loss` where there is one.
    """
    if aux_loss is None or not coefficient:
        return loss, {}
    share = coefficient * aux_loss
    return loss + (share if divisor == 1 else share / divisor), {"aux_loss": (aux_loss, torch.ones_like(aux_loss))}


def insert_after(name: str, metrics: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Returns `metrics` with `more` behind the metric `name`: logs have TRL's order."""
    names = list(metrics)
    first = {key: metrics[key] for key in names[: names.index(name) + 1]}
    return {**first, **more, **{key: value for key, value in metrics.items() if key not in first}}
