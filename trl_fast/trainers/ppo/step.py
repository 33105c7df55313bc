"""Computes PPO's update step: the policy's and the value model's loss and their metrics."""

from __future__ import annotations

import torch

from trl_fast.losses.ppo import ppo_policy_loss, update_metrics, value_loss
from trl_fast.modeling.classifier_head import head_inputs
from trl_fast.modeling.scoring import scoring_inputs
from trl_fast.ops import HeadOptions

from ..base.step import StepResult, router_keywords, with_router_loss
from .experience import PPOUpdate


def ppo_step(
    models: torch.nn.Module,
    update: PPOUpdate,
    *,
    head: HeadOptions,
    cliprange: float = 0.2,
    vf_coef: float = 0.1,
    cliprange_value: float = 0.2,
    temperature: float = 1.0,
    router_coef: float = 0.0,
) -> StepResult:
    """Computes the loss of one micro-batch of PPO, of both models together, and its metrics.

    Args:
        models: a `modeling.policy_and_value.PolicyAndValue` on the device of the update, wrapped or not.
        update: the micro-batch: N scored tokens of the policy, M states of the value model.
        head: the user's settings of the head.
        cliprange, vf_coef, cliprange_value: as in `PPOConfig`.
        temperature: divides the logits.
        router_coef: weight of a mixture of experts' load-balancing loss.
    """
    loss_inputs = update.loss_inputs
    policy = scoring_inputs(
        update.batch,
        outputs=("logprobs", "entropy"),
        temperature=temperature,
        token_loss=lambda scores, rows: ppo_policy_loss(scores, loss_inputs, cliprange, rows),
        group_sizes=None,
        head=head,
        **router_keywords(router_coef),
    )
    scored, values = models(policy=policy, value=head_inputs(update.state_batch))
    value = value_loss(values.float(), update.values, update.returns, cliprange_value)
    assert scored.loss is not None, "a token loss was asked for"
    loss, metrics = with_router_loss(scored.loss + vf_coef * value.loss, scored, router_coef)
    return StepResult(loss, {**metrics, **update_metrics(scored.tokens, loss_inputs, value, cliprange)}, scored.tokens)
