"""Computes what PPO's completions earned, and what the update aims at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_fast.losses.advantages import summed_rewards
from trl_fast.losses.ppo import States, ppo_targets

from .config import PPOConfig
from .critic import Critic
from .experience import Experience


@dataclass(frozen=True)
class ScoredRollout:
    """Holds S completions of this process with what they earned, on the CPU.

    - `prompts`, `completions`: as reward sources see them.
    - `samples`: with `old_logprobs`.
    - `rewards` (S, R) float32 by reward source; `scores` (S,) float32, their sum less the penalty.
    - `kl` (N,) float32 by token, the estimated divergence from the reference.
    """

    prompts: list
    completions: list
    samples: Experience
    rewards: torch.Tensor
    scores: torch.Tensor
    kl: torch.Tensor


def completion_scores(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    completion_ids: list[list[int]],
    eos: int | None,
    penalty: float | None,
) -> torch.Tensor:
    """Computes scores (S,) float32: the weighted sum of rewards, less the penalty where there is no EOS token.

    Args:
        rewards: (S, R) float32 by completion and reward source.
        weights: (R,) float32.
        completion_ids: the S completions' tokens.
        eos: the EOS token.
        penalty: None is none.
    """
    scores = summed_rewards(rewards, weights)
    if penalty is None:
        return scores
    return scores - penalty * torch.tensor([eos not in ids for ids in completion_ids])


def add_targets(
    samples: Experience, scores: torch.Tensor, kl: torch.Tensor, critic: Critic, args: PPOConfig, kl_coef: float
) -> None:
    """Adds values, advantages and returns to the samples.

    Args:
        samples: S completions with N tokens.
        scores: (S,) float32.
        kl: (N,) float32, the divergence of each token.
        critic: the value model, before the update.
        args: of the advantages.
        kl_coef: weight of the divergence in the rewards.
    """
    lengths = torch.tensor([len(ids) for ids in samples.completion_ids])
    # TRL's padded matrix has no place behind its longest completions.
    states = States(lengths, lengths < lengths.max())
    samples.has_end = states.has_end
    samples.values = critic.score(samples, states.has_end, args.local_rollout_forward_batch_size)
    advantages, returns = ppo_targets(
        *(kl, scores, torch.cat(samples.values), states),
        kl_coef=kl_coef,
        gamma=args.gamma,
        lam=args.lam,
        whiten_rewards=args.whiten_rewards,
    )
    samples.token_advantages = samples.split(advantages)
    samples.returns = list(returns.split(states.counts.tolist()))
