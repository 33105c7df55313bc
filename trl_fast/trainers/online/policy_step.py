"""Computes the update step of GRPO and RLOO: a policy-gradient loss of completions and its metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_fast.losses.policy_gradient import PolicyLossConfig, grpo_loss
from trl_fast.losses.policy_metrics import PolicyMetrics, grpo_metrics
from trl_fast.modeling.scoring import ModelScores, score
from trl_fast.ops import HeadOptions

from ..base.step import StepResult, router_keywords, with_router_loss
from .micro_batches import Update


def policy_step(
    model: torch.nn.Module,
    update: Update,
    config: PolicyLossConfig,
    *,
    head: HeadOptions,
    temperature: float = 1.0,
    entropy_coef: float | None = None,
    entropy_mask: Callable[[torch.Tensor], torch.Tensor] | None = None,
    router_coef: float = 0.0,
    loss_divisor: int = 1,
    scorer: Callable[..., ModelScores] | None = None,
) -> tuple[StepResult, PolicyMetrics]:
    """Computes the loss of one micro-batch of GRPO or RLOO, and its metrics.

    Args:
        model: the policy, with `modeling.scoring.attach_scoring`, on the device of the update.
        update: the micro-batch: scored tokens (N,) of S completions.
        config: the loss.
        head: the user's settings of the head.
        temperature: divides the logits.
        entropy_coef, entropy_mask: as in `losses.policy_gradient.grpo_loss`.
        router_coef: weight of a mixture of experts' load-balancing loss.
        loss_divisor: accumulation steps that the router's loss is divided by.
        scorer: what scores in the place of `modeling.scoring.score`, with its arguments.

    Returns:
        The loss with the router's metric, and the metrics of the policy loss.
    """
    loss_inputs = update.loss_inputs
    scored = (scorer or score)(
        model,
        update.batch,
        outputs=("logprobs", "entropy"),
        temperature=temperature,
        token_loss=lambda scores, rows: grpo_loss(
            scores, loss_inputs, config, rows=rows, entropy_coef=entropy_coef, entropy_mask=entropy_mask
        ),
        group_sizes=update.group_sizes(config.scope),
        head=head,
        **router_keywords(router_coef),
    )
    assert scored.loss is not None, "a token loss was asked for"
    loss, metrics = with_router_loss(scored.loss, scored, router_coef, loss_divisor)
    return StepResult(loss, metrics, scored.tokens), grpo_metrics(scored.tokens, loss_inputs, config, update.left_out)
