"""Computes the step of distillation from a server: a student's divergence from log-probabilities that are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_fast.modeling.distillation import DivergenceSettings
from trl_fast.modeling.given_divergence import ReadGivenDivergence
from trl_fast.ops import HeadOptions

from ..base.step import StepResult
from .step import DistillationUpdate, divergence_step


@dataclass(frozen=True)
class ServerUpdate(DistillationUpdate):
    """Holds a micro-batch with the tokens that are compared at each place, ids (N, C), and their log-probs (N, C)."""

    ids: torch.Tensor
    logprobs: torch.Tensor


def server_distillation_step(
    model: Callable[..., Any],
    update: ServerUpdate,
    settings: DivergenceSettings,
    *,
    head: HeadOptions,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    **keywords: Any,
) -> StepResult:
    """Computes the loss of one micro-batch, Σ weight · divergence, and the metric entropy.

    The arguments are those of `distillation_step`.
    """
    reading = ReadGivenDivergence(update.ids, update.logprobs, update.weights, settings, head)
    return divergence_step(
        *(model, update.batch, update.weights, reading), router_coef=router_coef, loss_divisor=loss_divisor, **keywords
    )
