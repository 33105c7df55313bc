"""Computes advantages from rewards: how much better a completion was than was to be expected.

A reward is NaN where a reward function had nothing to say; a completion of which none had anything to say is no part
of any mean, and its advantage is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Keeps a group of equal rewards finite.
_EPSILON = 1e-4


class Advantages(NamedTuple):
    """Holds the advantages of N completions, in groups of consecutive ones that share a prompt.

    Attributes:
        advantages: (N,) float32, finite.
        rewards: (N,) float32, the weighted sum of the reward functions; NaN where none said anything.
        is_flat: bool, one value a completion or a group: whether the spread of the rewards there is zero. Empty where
            completions are compared with no others.
    """

    advantages: torch.Tensor
    rewards: torch.Tensor
    is_flat: torch.Tensor


def nan_std(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
    """Computes the standard deviation, with Bessel's correction, of the values (any shape) that are not NaN."""
    dims = tuple(range(values.dim())) if dim is None else dim
    variance = torch.nanmean((values - values.nanmean(dims, keepdim=True)) ** 2, dims, keepdim=keepdim)
    count = (~values.isnan()).sum(dims, keepdim=keepdim)
    return torch.where(count > 1, variance * count / (count - 1), torch.nan).sqrt()


def summed_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums rewards (N, R) with weights (R,) over reward functions to (N,); NaN where all are NaN."""
    return (rewards * weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)


def group_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    *,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Advantages:
    """Computes rewards less their group's mean, over a standard deviation. GRPO, arXiv 2402.03300, Section 4.1.2.

    Args:
        rewards: (N, R) float32 by completion and reward function; NaN for none.
        weights: (R,) float32.
        num_generations: completions a group.
        scale_rewards: whose standard deviation divides: that of the "group", of the "batch" (arXiv 2508.08221), or
            "none" (Dr. GRPO, arXiv 2503.20783).
        aggregation: "sum_then_normalize", or "normalize_then_sum": every function's rewards are normalised in their
            group and the weighted sums then in the batch (GDPO, arXiv 2601.05242).
    """
    summed = summed_rewards(rewards, weights)
    if aggregation == "normalize_then_sum":
        grouped = rewards.view(-1, num_generations, rewards.shape[1])
        spread = nan_std(grouped, 1, keepdim=True) if num_generations > 1 else 0.0
        normalized = (grouped - grouped.nanmean(1, keepdim=True)) / (spread + _EPSILON)
        values = summed_rewards(normalized.view_as(rewards), weights)
        values = values.masked_fill(summed.isnan(), torch.nan)
        spread = _spread(values)
        advantages = (values - values.nanmean()) / (spread + _EPSILON)
    else:
        grouped = summed.view(-1, num_generations)
        spread = _spread(summed)
        if scale_rewards != "batch":
            spread = nan_std(grouped, 1) if num_generations > 1 else torch.zeros_like(grouped[:, 0])
            spread = spread.repeat_interleave(num_generations)
        advantages = summed - grouped.nanmean(1).repeat_interleave(num_generations)
        if scale_rewards != "none":
            advantages = advantages / (spread + _EPSILON)
    return Advantages(advantages.nan_to_num(nan=0.0), summed, _is_zero(spread))


def leave_one_out_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    *,
    penalties: torch.Tensor | None = None,
    clip_range: tuple[float, float] | None = None,
    normalize: bool = False,
) -> Advantages:
    """Computes rewards less the mean of the group's other ones. RLOO, arXiv 2402.14740, Eq. 7.

    Args:
        rewards, weights, num_generations: as in `group_advantages`.
        penalties: (N,), what is taken from each completion's reward (β times its KL divergence), after clipping.
        clip_range: bounds of the weighted sum.
        normalize: whether the advantages of the batch are whitened.
    """
    summed = summed_rewards(rewards, weights)
    values = summed if clip_range is None else summed.clamp(*clip_range)
    values = values if penalties is None else values - penalties
    grouped = values.view(-1, num_generations)
    if num_generations > 1:
        others = (~grouped.isnan()).sum(1, keepdim=True) - 1
        advantages = (grouped - (grouped.nansum(1, keepdim=True) - grouped) / others).flatten()
        # No other completion to compare with: 0 / 0.
        advantages = torch.where(others.repeat_interleave(num_generations) > 0, advantages, torch.nan)
        spread = nan_std(grouped, 1)
    else:
        advantages, spread = torch.zeros_like(values), torch.zeros_like(values)
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (nan_std(advantages) + _EPSILON)
    return Advantages(advantages.nan_to_num(nan=0.0), summed, _is_zero(spread))


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Computes the standard deviation of a whole batch, repeated for each of its values."""
    return nan_std(values).expand_as(values) if values.numel() > 1 else torch.zeros_like(values)


def _is_zero(spread: torch.Tensor) -> torch.Tensor:
    return torch.isclose(spread, torch.zeros_like(spread))
