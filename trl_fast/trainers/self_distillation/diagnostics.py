"""Records how SDPO's rewards differ, and warns while there is nothing to learn."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_fast.losses.advantages import summed_rewards

logger = logging.getLogger(__name__)


def reward_diagnostics(
    rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str], group: int, tolerance: float
) -> dict[str, float]:
    """Computes the metrics of rewards and of their groups.

    Args:
        rewards: (N, R) float32 by completion and reward source, NaN for none.
        weights: (R,) float32; names: of the sources.
        group: consecutive completions of one prompt.
        tolerance: the standard deviation up to which the rewards of a group do not differ.
    """
    summed = summed_rewards(rewards, weights).nan_to_num(nan=0.0)
    spreads = summed.view(-1, group).std(dim=1) if group > 1 else torch.zeros_like(summed)
    values = {
        "reward_mean": summed.mean(),
        "reward_std": summed.std() if len(summed) > 1 else summed.new_zeros(()),
        "reward_min": summed.min(),
        "reward_max": summed.max(),
        "group_reward_std_mean": spreads.mean(),
        "flat_group_fraction": (spreads <= tolerance).float().mean(),
    }
    means = zip(names, rewards.nanmean(dim=0), strict=True)
    values |= {f"rewards/{name}": mean for name, mean in means}
    return {f"self_distillation/{name}": value.item() for name, value in values.items()}


class Diagnostics:
    """Warns of generations in a row that teach nothing: of the first one, and of every so many.

    args: with `diagnostics_warning_interval` and `diagnostics_flat_tolerance`; is_main_process: whether this process
    is the one that writes.
    """

    def __init__(self, args: Any, *, is_main_process: bool) -> None:
        self._args, self._is_main_process = args, is_main_process
        self._in_a_row: Counter[tuple[str, str]] = Counter()

    def warn_of_flat_rewards(self, metrics: Mapping[str, float], mode: str) -> None:
        """Warns while rewards differ neither in their groups nor between them; metrics: of `reward_diagnostics`."""
        tolerance = self._args.diagnostics_flat_tolerance
        is_flat = metrics["self_distillation/reward_std"] <= tolerance
        is_flat = is_flat and metrics["self_distillation/flat_group_fraction"] >= 1 - tolerance
        self._see(
            *("flat rewards", mode, is_flat),
            "All completions have the same reward, so that the policy's loss teaches nothing; see whether the reward "
            "functions tell them apart, and whether success_reward_threshold is one that they reach.",
        )

    def warn_of_no_teacher(self, metrics: Mapping[str, float], mode: str) -> None:
        """Warns while no completion has a teacher, or none is successful; metrics: of `context_metrics`."""
        tolerance = self._args.diagnostics_flat_tolerance
        self._see(
            *("no teacher", mode, metrics["self_distillation/reprompt_sample_fraction"] <= tolerance),
            "No completion has a teacher, so that distillation teaches nothing: no reward of another completion "
            "reaches success_reward_threshold, and there is no feedback that the teacher is shown.",
        )
        self._see(
            *("no success", mode, metrics["self_distillation/success_group_fraction"] <= tolerance),
            "No completion is successful; if this goes on, take easier prompts, or lower success_reward_threshold.",
        )

    def _see(self, kind: str, mode: str, is_so: bool, message: str) -> None:
        interval, key = self._args.diagnostics_warning_interval, (kind, mode)
        self._in_a_row[key] = self._in_a_row[key] + 1 if is_so else 0
        count = self._in_a_row[key]
        if is_so and interval and self._is_main_process and (count == 1 or count % interval == 0):
            logger.warning(f"{message} Generations in a row: {count}.")
