"""Metrics of a generation, under TRL's names in TRL's order."""

from __future__ import annotations

import importlib
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.losses.advantages import Advantages, nan_std
from trl_fast.losses.policy_gradient import PolicyMetrics
from trl_fast.rollout import Rollout

from .generation_warnings import GenerationWarnings

# Where completions are logged as a table too; modules of these names, alike in what is used of them.
TABLE_LOGGERS = {"wandb", "trackio"}


def length_metrics(lengths: torch.Tensor, cut_off: torch.Tensor) -> dict[str, float]:
    """Of completions' lengths (N,) in tokens, and which of them did not end by themselves, (N,) bool."""
    ended = lengths[~cut_off]
    ended = ended if len(ended) else lengths.new_zeros(1)
    values = {
        "mean_length": lengths.mean(),
        "min_length": lengths.min(),
        "max_length": lengths.max(),
        "clipped_ratio": cut_off.float().mean(),
        "mean_terminated_length": ended.mean(),
        "min_terminated_length": ended.min(),
        "max_terminated_length": ended.max(),
    }
    return {f"completions/{name}": value.item() for name, value in values.items()}


def reward_metrics(names: list[str], rewards: torch.Tensor, found: Advantages) -> list[tuple[str, float]]:
    """Of rewards (N, R) by reward function, and what was made of them; NaN where there is nothing to average.

    Functions of one name each have an entry under it.
    """
    values = []
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        values += [(f"rewards/{name}/mean", column.nanmean()), (f"rewards/{name}/std", nan_std(column))]
    values += [("reward", found.rewards.nanmean()), ("reward_std", nan_std(found.rewards))]
    values.append(("frac_reward_zero_std", found.is_flat.float().mean()))
    numbers = torch.stack([value for _, value in values]).tolist()
    return [(name, number) for (name, _), number in zip(values, numbers, strict=True)]


class GenerationMetrics(GenerationWarnings):
    """The part of an online trainer that keeps what is logged of its generations, of all processes."""

    @cached_property
    def _pending_columns(self) -> dict[str, list]:
        return defaultdict(list)

    @cached_property
    def _pending_metrics(self) -> dict[str, list[float]]:
        return defaultdict(list)

    def log_column(self, column: str, values: list) -> None:
        """Takes a further column of the table of completions, from a reward function."""
        self._pending_columns[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Takes a number from a reward function, whose mean is logged."""
        self._pending_metrics[name].append(value)

    def record_value(self, name: str, value: float) -> None:
        """Keeps a number that is the same in all processes until the next log; NaN takes no part."""
        self._record_tensor(name, torch.full((), float(value), device=self.accelerator.device))

    def _record_tensor(self, name: str, value: torch.Tensor) -> None:
        """The same of a number (0-d) that is on the device and stays there."""
        self.record({name: (value, torch.ones_like(value))})

    def record_extremes(self, values: dict[str, torch.Tensor]) -> None:
        """Keeps the least (…_min) or the largest (…_max) of values (B,) of all processes, NaN aside."""
        for name, own in values.items():
            every = self.accelerator.gather(own)
            unknown, sign = every.isnan(), -1 if name.endswith("_min") else 1
            extreme = sign * (sign * every).masked_fill(unknown, -torch.inf).amax()
            self._record_tensor(name, extreme.masked_fill(unknown.all(), torch.nan))

    def record_sampling(self, name: str, values: torch.Tensor, statistics: tuple[str, ...]) -> None:
        """Keeps statistics ("min", "mean", "max") of values (M,) of all processes; 0 of nothing."""
        values = values if len(values) else torch.zeros(1)
        for statistic in statistics:
            every = self.accelerator.gather(copy_to_device(getattr(values, statistic)(), self.accelerator.device))
            self._record_tensor(f"sampling/{name}/{statistic}", getattr(every, statistic)())

    def record_policy(self, metrics: PolicyMetrics) -> None:
        """Keeps a micro-batch's metrics of the loss."""
        self.record(metrics.means)
        self.record_extremes(metrics.by_sequence)

    def _record_lengths(self, rollout: Rollout, mask: list[torch.Tensor] | None) -> torch.Tensor:
        """Records the completions' lengths; which of them were cut off, (S,) bool."""
        lengths = [len(ids) for ids in rollout.completion_ids] if mask is None else [int(m.sum()) for m in mask]
        ends = {*self.end_ids, self.processing_class.pad_token_id}
        cut_off = torch.tensor([ids[-1] not in ends for ids in rollout.completion_ids])
        if self.mode == "train":
            self._tokens.seen += sum(map(len, rollout.prompt_ids)) + sum(lengths)
        self.record_value("num_tokens", self._tokens.seen)
        own = torch.stack((torch.tensor(lengths), cut_off.long()), 1).to(self.accelerator.device)
        # Read once: the numbers below are many and small.
        every = self.accelerator.gather(own).cpu()
        for name, value in length_metrics(every[:, 0].float(), every[:, 1].bool()).items():
            self.record_value(name, value)
        self._warn_of_cut_off(every[:, 1].bool())
        return cut_off

    def _record_rewards(self, rewards: torch.Tensor, found: Advantages) -> None:
        for name, value in reward_metrics(self.reward_functions.names, rewards, found):
            self.record_value(name, value)
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics.get(name, []))
            self.record_value(name, sum(values) / len(values))
        self._pending_metrics.clear()

    def _keep_completions(self, prompts: list, completions: list, rewards: torch.Tensor, found: Advantages) -> None:
        columns = {"prompt": gather_object(prompts), "completion": gather_object(completions)}
        for name in sorted(set(gather_object(list(self._pending_columns)))):
            columns[name] = gather_object(self._pending_columns.get(name, [None] * len(prompts)))
        self._pending_columns.clear()
        by_function = dict(zip(self.reward_functions.names, rewards.t().tolist(), strict=True))
        self._completions.add(by_function, **columns, advantage=found.advantages.tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base; and the last generation's completions, where log_completions asks for them."""
        super().log(logs, start_time)
        if not (self.args.log_completions and self.accelerator.is_main_process):
            return
        step = self.state.global_step
        unique = self.args.log_unique_prompts
        self._completions.show(step, self.args.num_completions_to_print, unique)
        self._completions.save(Path(self.args.output_dir) / "completions", step)
        for name in TABLE_LOGGERS & {*self.args.report_to}:
            logger = importlib.import_module(name)
            # No run of wandb is open before training.
            if getattr(logger, "run", True) is not None:
                logger.log({"completions": logger.Table(dataframe=self._completions.frame(step, unique))})
