"""Computes the losses and metrics of Proximal Policy Optimization with a value model and a KL penalty.

PPO: arXiv 1707.06347; the KL penalty: arXiv 1909.08593.

Notation: S completions with N tokens in all; M states, one before each token and, for some completions, one after
their last token (`States`). π is the policy that sampled, π_ref the reference. Vectors are packed: completion after
completion, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_fast.ops import TokenScores
from trl_fast.ops.policy_loss import kl_estimates
from trl_fast.ops.token_scores import required

from .loss_inputs import PolicyLossInputs
from .mean_metric import Metric
from .policy_gradient import PolicyLossConfig, grpo_loss, policy_terms

KL_ESTIMATORS = ("k1", "k3")
# Keeps equal values finite, as in TRL.
_WHITENING_EPSILON = 1e-8
# How far one update of the adaptive coefficient may see the divergence from its target, as a share of the target.
_MAX_KL_ERROR = 0.2


@dataclass(frozen=True, eq=False)
class States:
    """Holds where the states of S completions are in one vector (M,).

    A completion of L tokens has a state before each of them, and one more after the last where `has_end` says so. Its
    score is the reward of its last state: TRL adds it behind the last token where its padded matrix has room there.

    - `lengths` (S,) int64, in tokens, at least 1.
    - `has_end` (S,) bool.
    """

    lengths: torch.Tensor
    has_end: torch.Tensor

    @cached_property
    def counts(self) -> torch.Tensor:
        """Counts the states of each completion, (S,) int64."""
        return self.lengths + self.has_end.long()

    @cached_property
    def last(self) -> torch.Tensor:
        """Returns the index of each completion's last state, (S,) int64."""
        return self.counts.cumsum(0) - 1

    @cached_property
    def is_token(self) -> torch.Tensor:
        """Says which states are followed by a token, (M,) bool."""
        flags = torch.ones(int(self.counts.sum()), dtype=torch.bool, device=self.lengths.device)
        flags[self.last[self.has_end]] = False
        return flags


def kl_penalties(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str = "k1") -> torch.Tensor:
    """Estimates the divergence of π from π_ref at each token (N,): d = log π_ref − log π, k1 is −d, k3 e^d − 1 − d.

    Schulman, "Approximating KL Divergence" (2020).

    Raises:
        ValueError: the estimator is unknown.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator={estimator!r} is unknown; expected one of {', '.join(KL_ESTIMATORS)}")
    return logprobs - ref_logprobs if estimator == "k1" else kl_estimates(logprobs, ref_logprobs)


def state_rewards(kl: torch.Tensor, scores: torch.Tensor, kl_coef: float, states: States) -> torch.Tensor:
    """Computes rewards (M,): −kl_coef·kl of each token (N,), and each completion's score (S,) at its last state."""
    rewards = kl.new_zeros(len(states.is_token))
    rewards[states.is_token] = -kl_coef * kl
    rewards[states.last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, states: States, gamma: float = 1.0, lam: float = 0.95
) -> torch.Tensor:
    """Computes advantages (M,) of rewards, values (M,): A_t = δ_t + γλ·A_(t+1), δ_t = r_t + γ·V_(t+1) − V_t.

    Nothing follows a completion's last state. Generalized advantage estimation, arXiv 1506.02438, Eq. 16.
    """
    following = torch.cat((values[1:], values.new_zeros(1)))
    following[states.last] = 0
    deltas = rewards + gamma * following - values
    columns = pad_sequence(list(deltas.split(states.counts.tolist())))
    advantage = torch.zeros_like(columns[0])
    for step in reversed(range(len(columns))):
        advantage = columns[step] + gamma * lam * advantage
        columns[step] = advantage
    steps = torch.arange(len(columns), device=values.device)
    return columns.t()[steps < states.counts[:, None]]


def whiten(values: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Scales values (N,) to a variance of 1 (Bessel's correction); their mean becomes 0 if `shift_mean`, or stays."""
    mean = values.mean()
    variance = values.var() if len(values) > 1 else torch.zeros_like(mean)
    whitened = (values - mean) * torch.rsqrt(variance + _WHITENING_EPSILON)
    return whitened if shift_mean else whitened + mean


class Targets(NamedTuple):
    """Holds what the update aims at.

    Attributes:
        advantages: (N,), whitened.
        returns: (M,), what the values should have been.
    """

    advantages: torch.Tensor
    returns: torch.Tensor


def ppo_targets(
    kl: torch.Tensor,
    scores: torch.Tensor,
    values: torch.Tensor,
    states: States,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
) -> Targets:
    """Computes the advantages and returns of one rollout.

    Args:
        kl: (N,) float32, of `kl_penalties`.
        scores: (S,) float32, the completions' rewards.
        values: (M,) float32, of the value model before the update.
        states: where tokens and completions are in those vectors.
        kl_coef: weight of the divergence in the rewards.
        gamma, lam: discount, and λ of GAE.
        whiten_rewards: whether rewards are scaled to a variance of 1; their mean stays.
    """
    rewards = state_rewards(kl, scores, kl_coef, states)
    if whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    advantages = gae(rewards, values, states, gamma, lam)
    return Targets(whiten(advantages[states.is_token]), advantages + values)


def ppo_loss_inputs(old_logprobs: torch.Tensor, advantages: torch.Tensor) -> PolicyLossInputs:
    """Returns the policy loss's inputs for a micro-batch's tokens, both (N,): all count the same.

    Each has its own advantage, so each is a sequence of its own to the policy losses of `losses.policy_gradient`.
    """
    count = len(advantages)
    return PolicyLossInputs(
        branch=torch.arange(count, device=advantages.device),
        advantages=advantages,
        weights=torch.full_like(advantages, 1 / max(count, 1)),
        old_logprobs=old_logprobs,
    )


def ppo_policy_loss(
    scores: TokenScores, inputs: PolicyLossInputs, cliprange: float, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes the mean over tokens of max(−A·ρ, −A·clip(ρ, 1 − cliprange, 1 + cliprange)), 0-d.

    arXiv 1707.06347, Eq. 7.

    rows: as in `grpo_loss`.
    """
    return grpo_loss(scores, inputs, PolicyLossConfig("dapo", epsilon=cliprange), rows=rows)


class ValueLoss(NamedTuple):
    """Holds the loss, 0-d and differentiable, and `clipped` (M,) bool: where clipping made the loss larger."""

    loss: torch.Tensor
    clipped: torch.Tensor


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float) -> ValueLoss:
    """Computes ½ · the mean over states of max((V − R)², (clip(V, V_old ± cliprange) − R)²); all are (M,).

    From OpenAI's baselines; see detail 9 of Huang et al., "The 37 Implementation Details of PPO" (2022).
    """
    near = values.clamp(old_values - cliprange, old_values + cliprange)
    errors, clipped_errors = (values - returns) ** 2, (near - returns) ** 2
    return ValueLoss(0.5 * torch.max(errors, clipped_errors).mean(), (clipped_errors > errors).detach())


def rollout_metrics(
    logprobs: torch.Tensor, kl: torch.Tensor, scores: torch.Tensor, kl_coef: float
) -> dict[str, Metric]:
    """Computes TRL's metrics of a rollout, means over completions of sums over tokens.

    logprobs, kl: (N,) float32; scores: (S,) float32.
    """
    penalty = -kl_coef * kl.sum()
    totals = {
        "kl": kl.sum(),
        "entropy": -logprobs.sum(),
        "non_score_reward": penalty,
        "rlhf_reward": penalty + scores.sum(),
        "scores": scores.sum(),
    }
    return {f"objective/{name}": Metric.over(total, len(scores)) for name, total in totals.items()}


@torch.no_grad()
def update_metrics(
    scores: TokenScores, inputs: PolicyLossInputs, value: ValueLoss, cliprange: float
) -> dict[str, Metric]:
    """Computes TRL's metrics of a micro-batch of the update: means over tokens (N,), for values over states (M,)."""
    config = PolicyLossConfig("dapo", epsilon=cliprange)
    found = policy_terms(scores.logprobs, inputs, config)
    difference = scores.logprobs - required(inputs.old_logprobs)
    by_token = {
        "policy/approxkl_avg": 0.5 * difference**2,
        "policy/clipfrac_avg": (found.terms > -inputs.advantages * found.ratio).float(),
        "loss/policy_avg": found.terms,
        "policy/entropy_avg": required(scores.entropy),
        "val/ratio": found.ratio,
    }
    tokens, states = len(inputs.advantages), len(value.clipped)
    metrics = {name: Metric.over(values.sum(), tokens) for name, values in by_token.items()}
    metrics["loss/value_avg"] = Metric.over(value.loss.detach() * states, states)
    metrics["val/clipfrac_avg"] = Metric.over(value.clipped.float().sum(), states)
    return metrics


@dataclass
class KLController:
    """Holds the weight of the divergence in the rewards: fixed, or steered towards a target.

    Ziegler et al., arXiv 1909.08593, Section 2.2: β ← β·(1 + K·e) with e = (KL − target) / target, within ±0.2, and K
    the episodes since the last update over `horizon`.

    Args:
        coefficient: the weight, at first.
        target: nats a completion that the divergence is to have; None keeps the weight.
        horizon: episodes in which the weight follows.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, episodes: int) -> None:
        """Takes the mean divergence of a rollout's completions, in nats, and how many there were."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -_MAX_KL_ERROR), _MAX_KL_ERROR)
        self.coefficient *= 1 + error * episodes / self.horizon
