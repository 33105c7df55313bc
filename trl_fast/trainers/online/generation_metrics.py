"""Records the metrics of generations, under TRL's names in TRL's order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trl_fast.data.images.messages import images_of, strip_images_from_messages
from trl_fast.losses.advantages import Advantages, nan_std
from trl_fast.rollout import Rollout, ToolRollout

from ..run_report.token_counts import TokenCounter
from .completions_log import CompletionsLog
from .generation_warnings import GenerationWarnings
from .metric_recorder import MetricRecorder


def length_metrics(lengths: torch.Tensor, cut_off: torch.Tensor) -> dict[str, float]:
    """Computes the metrics of completions' lengths.

    lengths: (N,) float32, in tokens. cut_off: (N,) bool, the completions that did not end by themselves.
    """
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


def reward_metrics(names: Sequence[str], rewards: torch.Tensor, found: Advantages) -> list[tuple[str, float]]:
    """Computes the metrics of rewards and advantages; NaN where there is nothing to average.

    Sources of one name each have an entry under it.

    Args:
        names: the sources' names.
        rewards: (N, R) float32 by completion and source, NaN for none.
        found: the advantages of the N completions.
    """
    values = []
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        values += [(f"rewards/{name}/mean", column.nanmean()), (f"rewards/{name}/std", nan_std(column))]
    values += [("reward", found.rewards.nanmean()), ("reward_std", nan_std(found.rewards))]
    if len(found.is_flat):
        values.append(("frac_reward_zero_std", found.is_flat.float().mean()))
    numbers = torch.stack([value for _, value in values]).tolist()
    return [(name, number) for (name, _), number in zip(values, numbers, strict=True)]


def _images(messages: Any) -> list:
    return images_of(messages) if isinstance(messages, list) else []


class GenerationMetrics:
    """Records what is logged of generations, of all processes, and keeps their completions for the table.

    Args:
        accelerator: gathers values of all processes.
        recorder: takes the numbers.
        tokens: counts the tokens that were trained on.
        completions: the table.
        warnings: says where nothing can be learned.
        reward_names: returns the reward sources' names as they are now.
        end_ids: tokens that a completion that was not cut off ends with.
        logs_rewards: whether the rewards of each source are logged, and the numbers that reward functions log.
        logs_images: whether the table keeps the images of prompts and of tools' results.

    Attributes:
        columns, numbers: what reward functions logged in the present generation, by name.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recorder: MetricRecorder,
        tokens: TokenCounter,
        completions: CompletionsLog,
        warnings: GenerationWarnings,
        *,
        reward_names: Callable[[], Sequence[str]],
        end_ids: Collection[int],
        logs_rewards: bool = True,
        logs_images: bool = False,
    ) -> None:
        self._accelerator, self._recorder, self._tokens = accelerator, recorder, tokens
        self._completions, self._warnings = completions, warnings
        self._reward_names, self._end_ids = reward_names, set(end_ids)
        self._logs_rewards, self._logs_images = logs_rewards, logs_images
        self.columns: dict[str, list] = defaultdict(list)
        self.numbers: dict[str, list[float]] = defaultdict(list)

    def log_column(self, column: str, values: list) -> None:
        """Takes a further column of the table of completions, or a part of it, from a reward function.

        Raises:
            TypeError: the name is no text.
        """
        if not isinstance(column, str):
            raise TypeError(f"log_extra: expected a name for the column, got {column!r}")
        self.columns[column].extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """Takes a number from a reward function; the mean is logged.

        Raises:
            TypeError: the name is no text, or the value no number.
        """
        if not isinstance(name, str):
            raise TypeError(f"log_metric: expected a name, got {name!r}")
        if not isinstance(value, Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise TypeError(f"log_metric({name!r}): expected a number, got {value!r}")
        self.numbers[name].append(value)

    def check_columns(self, count: int) -> None:
        """Raises ValueError if reward functions logged a column that has not one value for each completion."""
        for name, values in self.columns.items():
            if len(values) != count:
                self.columns.clear()
                raise ValueError(
                    f"log_extra: reward functions gave column {name!r} {len(values)} values for {count} completions; "
                    "give one for each, and each column from one function"
                )

    def record_lengths(self, rollout: Rollout, mask: list[torch.Tensor] | None, *, is_training: bool) -> torch.Tensor:
        """Records completions' lengths, and how often tools were called.

        Args:
            rollout: S completions of this process.
            mask: (length,) float32 a completion, 1 for the tokens that count; None: all do.
            is_training: whether the tokens are counted as trained on.

        Returns:
            (S,) bool: the completions that were cut off.
        """
        lengths = [len(ids) for ids in rollout.completion_ids] if mask is None else [int(m.sum()) for m in mask]
        cut_off = torch.tensor([ids[-1] not in self._end_ids for ids in rollout.completion_ids])
        if is_training:
            self._tokens.seen += sum(map(len, rollout.prompt_ids)) + sum(lengths)
        own = torch.stack((torch.tensor(lengths), cut_off.long()), 1).to(self._accelerator.device)
        # Read once: the numbers below are many and small.
        every = self._accelerator.gather(own).cpu()
        metrics = length_metrics(every[:, 0].float(), every[:, 1].bool())
        self._recorder.record_values({"num_tokens": self._tokens.seen, **metrics})
        self._warnings.warn_of_cut_off(every[:, 1].bool())
        if isinstance(rollout, ToolRollout):
            self.record_tools(rollout)
        return cut_off

    def record_tools(self, rollout: ToolRollout) -> None:
        """Records how often completions called tools, and how often these failed."""
        counts = [[rollout.calls, rollout.failures, len(rollout.completion_ids)]]
        own = torch.tensor(counts, device=self._accelerator.device)
        calls, failures, completions = self._accelerator.gather(own).sum(0).tolist()
        frequencies = {"call": calls / completions, "failure": failures / calls if calls else 0.0}
        self._recorder.record_values({f"tools/{name}_frequency": value for name, value in frequencies.items()})

    def record_environments(self, failed: torch.Tensor) -> None:
        """Records how many of all processes' completions lost their environment; failed: (S,) bool, of this one's."""
        every = self._accelerator.gather(failed.float().to(self._accelerator.device))
        self._recorder.record_values({"environments/failure_frequency": every.mean().item()})

    def record_outcome(
        self, prompts: list, completions: list, rewards: torch.Tensor, found: Advantages, group: int
    ) -> None:
        """Records rewards and advantages, and keeps the completions for the table.

        Args:
            prompts, completions: of this process.
            rewards: (N, R) float32 of all processes, by completion and source.
            found: the advantages of all processes' completions.
            group: consecutive completions that are held against each other.
        """
        if self._logs_rewards:
            self._record_rewards(rewards, found)
        self._warnings.warn_of_equal_rewards(found.rewards, group, prompts)
        by_source = dict(zip(self._reward_names(), rewards.t().tolist(), strict=True))
        self.keep_completions(prompts, completions, by_source, found.advantages.tolist())

    def keep_completions(
        self,
        prompts: list,
        completions: list,
        rewards: dict[str, list[float]] | None = None,
        advantages: list[float] | None = None,
    ) -> None:
        """Keeps completions for the table, of all processes. prompts, completions: of this process."""
        columns: dict[str, list] = {
            "prompt": gather_object([strip_images_from_messages(prompt) for prompt in prompts]),
            "completion": gather_object([strip_images_from_messages(completion) for completion in completions]),
        }
        if self._logs_images:
            pairs = zip(prompts, completions, strict=True)
            columns["images"] = gather_object([_images(prompt) + _images(completion) for prompt, completion in pairs])
        for name in sorted(set(gather_object(list(self.columns)))):
            columns[name] = gather_object(self.columns.get(name, [None] * len(prompts)))
        self.columns.clear()
        self._completions.add(rewards or {}, advantage=advantages, **columns)

    def _record_rewards(self, rewards: torch.Tensor, found: Advantages) -> None:
        values = reward_metrics(self._reward_names(), rewards, found)
        for name in sorted(set(gather_object(list(self.numbers)))):
            numbers = gather_object(self.numbers.get(name, []))
            values.append((name, sum(numbers) / len(numbers)))
        self.numbers.clear()
        self._recorder.record_values(values)
