"""Computes importance-weighted on-policy distillation (Xie et al., arXiv 2606.22600): a policy gradient on tokens.

The advantage of a token is what its teacher finds it likelier by: a = log t − log π. Early tokens weigh more than what
stands behind much disagreement: w = 1 + γ (1 − Σ of abs(a) before the token / Σ of abs(a) of its whole completion).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_fast.ops import TokenScores
from trl_fast.ops.token_scores import required

from .loss_inputs import ALL, Rows, sums_by_sequence
from .mean_metric import Metric


@dataclass(frozen=True)
class IWOPDLossConfig:
    """Holds γ, by which early tokens weigh more, and ε, the least sum that is divided by."""

    gamma: float = 0.5
    epsilon: float = 1e-8


@dataclass(frozen=True, eq=False)
class IWOPDInputs:
    """Holds what the loss reads of N tokens in S completions, ordered by completion.

    - `branch` (N,) int64: the completion of each token; `num_sequences`: S.
    - `weights` (N,) float32: what a token counts in the loss, 0 where it does not.
    - `teacher_logprobs` (N,) float32: the teacher's.
    - `rollout_logprobs` (N,) float32: of what sampled the tokens, NaN where it did not say; None: those of the policy.
    """

    branch: torch.Tensor
    num_sequences: int
    weights: torch.Tensor
    teacher_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor | None = None


@torch.no_grad()
def token_advantages(logprobs: torch.Tensor, inputs: IWOPDInputs, rows: Rows = ALL) -> torch.Tensor:
    """Computes the advantages (R,) of the tokens `rows` whose log-probabilities under the policy are (R,)."""
    sampled = logprobs
    if inputs.rollout_logprobs is not None:
        known = inputs.rollout_logprobs[rows]
        sampled = torch.where(known.isnan(), logprobs, known)
    advantages = inputs.teacher_logprobs[rows] - sampled
    return torch.where(inputs.weights[rows] == 0, 0.0, advantages)


@torch.no_grad()
def prefix_weights(
    advantages: torch.Tensor, inputs: IWOPDInputs, config: IWOPDLossConfig, rows: Rows = ALL
) -> torch.Tensor:
    """Computes the weights (R,) float32 of the tokens `rows`, all of some completions, with these advantages (R,)."""
    # A sum over all tokens less that of earlier completions: in float32 digits would be lost.
    sizes, branch = advantages.abs().double(), inputs.branch[rows]
    totals = sums_by_sequence(sizes, inputs.branch, inputs.num_sequences, rows)
    before = totals.cumsum(dim=0) - totals
    prefixes = sizes.cumsum(dim=0) - sizes - before[branch]
    shares = prefixes.clamp(min=0) / totals.clamp(min=config.epsilon)[branch]
    return (1 + config.gamma * (1 - shares)).to(advantages.dtype)


def iw_opd_loss(
    scores: TokenScores, inputs: IWOPDInputs, config: IWOPDLossConfig, *, rows: Rows = ALL
) -> torch.Tensor:
    """Computes −Σ weight · w · a · log π over the tokens `rows`, all of some completions, 0-d and differentiable.

    scores: their `logprobs` (R,).
    """
    logprobs = required(scores.logprobs)
    advantages = token_advantages(logprobs, inputs, rows)
    factors = inputs.weights[rows] * prefix_weights(advantages, inputs, config, rows) * advantages
    return -(factors * logprobs).sum()


@torch.no_grad()
def iw_opd_metrics(scores: TokenScores, inputs: IWOPDInputs, config: IWOPDLossConfig) -> dict[str, Metric]:
    """Computes the means over the tokens that count, and the least and the largest weight, of a micro-batch."""
    advantages = token_advantages(required(scores.logprobs), inputs)
    weights, counts = prefix_weights(advantages, inputs, config), inputs.weights != 0
    count, one = counts.sum().float(), counts.any().float()

    def mean(values: torch.Tensor) -> Metric:
        return Metric(torch.where(counts, values, 0.0).sum(), count)

    def extreme(value: torch.Tensor) -> Metric:
        return Metric(torch.where(one == 0, 0.0, value), one)

    return {
        "iw_opd/mean_advantage": mean(weights * advantages),
        "iw_opd/mean_abs_advantage": mean(advantages.abs()),
        "iw_opd/mean_weight": mean(weights),
        "iw_opd/min_weight": extreme(weights.masked_fill(~counts, torch.inf).amin()),
        "iw_opd/max_weight": extreme(weights.masked_fill(~counts, -torch.inf).amax()),
    }
