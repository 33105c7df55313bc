"""Computes SDPO's step: a teacher's loss, a policy's, or both of them in shares that sum to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trl_fast.losses.mean_metric import Metric
from trl_fast.losses.policy_gradient import PolicyLossConfig, grpo_loss
from trl_fast.ops import HeadOptions, TokenScores

from ..base.step import StepResult
from ..online.micro_batches import Update, UpdateMaker
from ..online.policy_step import policy_step
from .samples import TaughtSamples, taught_update
from .step import (
    SelfDistillationSettings,
    SelfDistillationUpdate,
    Teacher,
    TokenLossBeside,
    self_distillation_step,
)

POLICY_LOSS = "self_distillation/policy_loss"


@dataclass(frozen=True)
class SDPOUpdate:
    """Holds a micro-batch of the same tokens for both losses; None: the loss has no weight."""

    taught: SelfDistillationUpdate | None
    policy: Update | None


def sdpo_update(
    maker: UpdateMaker,
    samples: TaughtSamples,
    kept: Sequence[int],
    weights: torch.Tensor,
    *,
    distillation_weight: float,
    loss_divisor: int,
) -> SDPOUpdate:
    """Returns the update of the completions `kept` of a micro-batch.

    weights: (B,) float32, the weight in the policy's loss of a token of each completion; loss_divisor: accumulation
    steps that the teacher's loss is divided by. Each loss has its share, `distillation_weight` of the teacher's.
    """
    taught = policy = None
    if distillation_weight < 1:
        policy = maker.update(samples, list(kept), weights * (1 - distillation_weight))
    if distillation_weight > 0:
        batch = None if policy is None else policy.batch
        taught = taught_update(maker, samples, kept, loss_divisor=loss_divisor, batch=batch)
        taught = replace(taught, weights=taught.weights * distillation_weight)
    return SDPOUpdate(taught, policy)


def sdpo_step(
    model: torch.nn.Module,
    teacher: Teacher,
    update: SDPOUpdate,
    settings: SelfDistillationSettings,
    config: PolicyLossConfig,
    *,
    policy_share: float,
    head: HeadOptions,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
) -> StepResult:
    """Computes the loss of one micro-batch, and the metrics of both losses as they are without their shares.

    Args:
        model, teacher, settings, head, router_coef, loss_divisor: as in `self_distillation_step`.
        update: the micro-batch.
        config: the policy's loss.
        policy_share: the share of the policy's loss.
    """
    policy, taught = update.policy, update.taught
    options: dict[str, Any] = {"head": head, "router_coef": router_coef, "loss_divisor": loss_divisor}
    if taught is None:
        assert policy is not None, "one of the losses has a weight"
        result, _ = policy_step(model, policy, config, temperature=settings.temperature, **options)
        return _with_policy_loss(result, policy, config, loss_divisor / policy_share)
    if policy is None:
        return self_distillation_step(model, teacher, taught, settings, **options)
    inputs = policy.loss_inputs

    def loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        return grpo_loss(scores, inputs, config, rows=rows)

    beside = TokenLossBeside(loss, policy.group_sizes(config.scope))
    result = self_distillation_step(model, teacher, taught, settings, beside=beside, **options)
    return _with_policy_loss(result, policy, config, loss_divisor / policy_share)


@torch.no_grad()
def _with_policy_loss(result: StepResult, policy: Update, config: PolicyLossConfig, factor: float) -> StepResult:
    """Returns a result with the policy's loss among its metrics, of the step's scores, times a factor."""
    assert result.scores is not None, "the policy's loss has scored the tokens"
    value = grpo_loss(result.scores, policy.loss_inputs, config) * factor
    return replace(result, metrics={POLICY_LOSS: Metric(value, torch.ones_like(value)), **result.metrics})
