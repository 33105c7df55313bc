"""Runs the loop of the online methods: rollout → rewards → advantages → update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from transformers import TrainerState

from trl_fast.data.prompt_only import PROMPT_IDS
from trl_fast.losses.advantages import Advantages
from trl_fast.rollout import RewardFunctions, Rollout, RolloutEngine, SamplingSettings, gathered_weights, generate
from trl_fast.rollout.images import PromptImages, RolloutImages, with_images_in_messages
from trl_fast.rollout.reward_answers import copied, shown
from trl_fast.rollout.samples import Samples
from trl_fast.rollout.user_calls import described, outcome_of

from .completion_reader import CompletionReader
from .environments import EnvironmentRollouts
from .generation_metrics import GenerationMetrics
from .rescue import Rescue
from .rollout_checks import check_images, check_rollout

Outcome = TypeVar("Outcome")


class SamplingMethod(Protocol):
    """Names what sampling reads of a method; a trainer is one.

    - `model`: the policy, in training mode but for evaluation. `state`: the trainer's.
    - `rollout_func`: a user's function, from prompts and the method to a dict of prompt_ids, completion_ids, logprobs,
      env_mask and further columns for reward sources; it takes the engine's place. None: there is none.
    """

    model: torch.nn.Module
    state: TrainerState
    rollout_func: Callable[[list, Any], dict[str, Any]] | None


class OnlineMethod(SamplingMethod, Protocol):
    """Brings what differs between methods with rewards; a trainer is one.

    - `group_size`: how many completions, one after the other, are compared with each other; None: all.
    """

    group_size: int | None

    def compute_advantages(self, samples: Samples, rewards: torch.Tensor) -> Advantages:
        """Computes the advantages (N,) of all processes' completions.

        samples: this process's completions; a method may add to them. rewards: (N, R) float32, the rewards of all
        processes' N completions by R reward sources; NaN where a source gave none.
        """

    def add_contexts(self, samples: Samples, rows: list[dict[str, Any]], rewards: torch.Tensor) -> None:
        """Adds what the loss reads of the rows, and of how other completions fared, to this process's samples.

        rows: of this process's completions; rewards: (N,) float32, the summed ones of all processes; NaN for none.
        """

    def deal(self, samples: Samples) -> Samples:
        """Returns the completions that this process trains on, of this process's with their advantages."""

    def add_logprobs(self, samples: Samples) -> None:
        """Adds what the loss reads about tokens to this process's samples, whose advantages are known."""


@dataclass(frozen=True)
class JudgedRollout:
    """Holds S completions of this process with their rewards.

    - `prompts`, `completions`: as reward sources see them, texts or conversations.
    - `rewards`: (S, R) float32 by completion and reward source; NaN where a source gave none.
    """

    prompts: list
    completions: list
    rollout: Rollout
    rewards: torch.Tensor


@dataclass
class RolloutLoop:
    """Samples completions, asks reward sources about them, computes advantages, and starts the update.

    Args:
        engine: generates completions.
        rewards: the reward sources.
        reader: turns tokens into the texts or conversations that reward sources see.
        metrics: records what is logged of a generation.
        rescue: saves the last whole step where an engine or a reward source fails.
        accelerator: gathers rewards of all processes.
        settings: returns how completions are sampled now.
        vocab_size: entries of the policy's head, for checks.
        excludes_cut_off: returns whether completions that were cut off are not learned from.
        prompt_ids_for_rewards: whether reward sources see the prompts' tokens.
        images: reads the images of prompts; None: there are none.
        environments: those that completions are made in; None: there are none.
        samples_class: the kind of samples that the method fills.
        generate_instead: takes the place of the engine and of `rollout_func`: from rows to what `generate` returns.
        reward_instead: takes the place of `rewards`: from rows, with further columns, prompts, completions and their
            tokens to rewards as in `JudgedRollout`.
    """

    engine: RolloutEngine
    rewards: RewardFunctions
    reader: CompletionReader
    metrics: GenerationMetrics
    rescue: Rescue
    accelerator: Accelerator
    settings: Callable[[], SamplingSettings]
    vocab_size: int
    excludes_cut_off: Callable[[], bool] = lambda: False
    prompt_ids_for_rewards: bool = False
    images: RolloutImages | None = None
    environments: EnvironmentRollouts | None = None
    samples_class: type[Samples] = Samples
    generate_instead: Callable[[list[dict[str, Any]]], tuple[Rollout, dict[str, list]]] | None = None
    reward_instead: Callable[[list[dict[str, Any]], list, list, list[list[int]]], torch.Tensor] | None = None

    def run(self, rows: list[dict[str, Any]], method: OnlineMethod, update: Callable[[Samples], Outcome]) -> Outcome:
        """Runs one generation of GRPO, RLOO or PPO: rollout → rewards → advantages → update.

        Args:
            rows: this process's prompts, one for each completion, with the dataset's columns.
            method: computes the advantages.
            update: takes the samples: cuts them into micro-batches, or makes all updates on them.

        Raises:
            ValueError: the rollout or a reward source returned something else than was expected.
            RuntimeError: a reward source raised.
        """
        with self._guard():
            rows = self.shown(rows)
            rollout, columns = self.generate(rows, method)
            judged = self.judge(rows, rollout, columns, method)
        samples = self.samples_of(rollout, method)
        rewards = self.accelerator.gather(judged.rewards.to(self.accelerator.device))
        found = method.compute_advantages(samples, rewards)
        first = self.accelerator.process_index * len(rows)
        samples.advantages = found.advantages[first : first + len(rows)].cpu()
        group = method.group_size or len(found.rewards)
        self.metrics.record_outcome(judged.prompts, judged.completions, rewards, found, group)
        method.add_contexts(samples, rows, found.rewards)
        samples = method.deal(samples)
        method.add_logprobs(samples)
        return update(samples)

    def judged_rollout(self, rows: list[dict[str, Any]], method: OnlineMethod) -> JudgedRollout:
        """Samples completions of the rows' prompts and has them rewarded, without metrics and without an update."""
        with self._guard():
            rows = self.shown(rows)
            rollout, columns = self.generate(rows, method)
            return self.judge(rows, rollout, columns, method)

    def shown(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns rows as users see them: with images, and what environments wrote, in their prompts' messages."""
        if self.environments is not None:
            rows = self.environments.reset(rows)
        if self.images is not None:
            self.images.forget()
            rows = with_images_in_messages(rows)
        return rows if self.environments is None else self.environments.with_tokens(rows)

    def _guard(self) -> AbstractContextManager[None]:
        # What a user puts in the place of a part may wait for other processes, as TRL's does.
        waits = self.accelerator.num_processes > 1 and (self.generate_instead or self.reward_instead)
        return nullcontext() if waits else self.rescue.guard()

    def generate(self, rows: list[dict[str, Any]], method: SamplingMethod) -> tuple[Rollout, dict[str, list]]:
        """Samples a completion for each row with the policy's present weights.

        Returns:
            The rollout, checked, and further columns for the reward sources.
        """
        self.engine.sync_weights(method.model, method.state.global_step)
        with gathered_weights(self.engine):
            return self._generate(rows, method)

    def _generate(self, rows: list[dict[str, Any]], method: SamplingMethod) -> tuple[Rollout, dict[str, list]]:
        prompts = [row["prompt"] for row in rows]
        images = None if self.images is None else self.images.of_prompts(prompts)
        columns: dict[str, list] = {}
        if self.generate_instead is not None:
            rollout, columns = self.generate_instead(rows)
        elif method.rollout_func is not None:
            rollout, columns = custom_rollout(method.rollout_func, prompts, method)
        else:
            rollout = self._ask_engine([list(row[PROMPT_IDS]) for row in rows], images)
        rollout = check_rollout(rollout, prompts, self.vocab_size)
        if self.images is not None:
            rollout.images = rollout.images or images
            check_images(rollout, prompts, self.images.reader.image_token_id)
        if self.prompt_ids_for_rewards:
            columns = {**columns, PROMPT_IDS: rollout.prompt_ids}
        return rollout, columns

    def _ask_engine(self, prompt_ids: list[list[int]], images: PromptImages | None) -> Rollout:
        # Around all of it, so that autocast casts the weights once and not for each token.
        with self.accelerator.autocast():
            settings = self.settings()
            return _called("rollout engine", self.engine, lambda: generate(self.engine, prompt_ids, settings, images))

    def judge(
        self, rows: list[dict[str, Any]], rollout: Rollout, columns: dict[str, list], method: OnlineMethod
    ) -> JudgedRollout:
        """Asks the reward sources about a rollout's completions; `columns` are given to them beside the rows' own."""
        prompts = [row["prompt"] for row in rows]
        own = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", PROMPT_IDS)}
        completions = self.reader.read(prompts, rollout)
        own |= columns
        ask = partial(self._ask_rewards, method=method)
        given = (prompts, completions, rollout.completion_ids, own)
        if self.reward_instead is not None:
            inputs = [{"prompt": prompt, **{name: own[name][i] for name in own}} for i, prompt in enumerate(prompts)]
            rewards = self.reward_instead(inputs, prompts, completions, rollout.completion_ids)
            if self.environments is not None:
                rewards = self.environments.without_failed(rewards)
        elif self.environments is not None:
            rewards = self.environments.rewarded(ask, *given, logged=self.metrics.columns)
        else:
            rewards = ask(*given)
        if self.reward_instead is None:
            self.metrics.check_columns(len(rows))
        return JudgedRollout(prompts, completions, rollout, rewards)

    def _ask_rewards(
        self,
        prompts: list,
        completions: list,
        completion_ids: list[list[int]],
        columns: dict[str, list],
        method: OnlineMethod,
    ) -> torch.Tensor:
        return self.rewards(
            *(prompts, completions, completion_ids, columns),
            trainer_state=method.state,
            log_extra=self.metrics.log_column,
            log_metric=self.metrics.log_metric,
        )

    def samples_of(self, rollout: Rollout, method: SamplingMethod) -> Samples:
        """Returns samples of a rollout, without advantages, and records the completions' lengths."""
        samples = self.samples_class.of(rollout.prompt_ids, rollout.completion_ids)
        if self.images is not None:
            samples.add_images(rollout.images, rollout.completion_images)
        samples.mask = token_vectors(rollout.mask)
        samples.sampling_logprobs = token_vectors(rollout.logprobs)
        cut_off = self.metrics.record_lengths(rollout, samples.mask, is_training=method.model.training)
        if self.excludes_cut_off():
            samples.excluded = cut_off
        if self.environments is not None:
            failed = self.environments.failed()
            samples.excluded = samples.excluded | failed
            self.metrics.record_environments(failed)
        counted = self.accelerator.gather(samples.lengths.sum().to(self.accelerator.device)).sum()
        samples.generation_tokens = counted.clamp(min=1).item() / self.accelerator.num_processes
        return samples


def custom_rollout(
    rollout_func: Callable[[list, Any], dict[str, Any]], prompts: list, method: Any
) -> tuple[Rollout, dict[str, list]]:
    """Returns what a rollout_func makes of prompts, and its further columns, a value for each completion.

    Raises:
        RuntimeError: it exited.
        ValueError: it returned no dict, or prompt_ids, completion_ids or logprobs are missing.
    """
    return _read_output(_ask(rollout_func, prompts, method), len(prompts))


def _called(kind: str, given: Any, call: Callable[[], Any]) -> Any:
    """Returns what a user's own function or engine gives.

    Raises:
        RuntimeError: it exited.
    """
    outcome = outcome_of(call, {})
    error = outcome.error
    if isinstance(error, Exception):
        raise error
    if error is not None:
        name = getattr(given, "__name__", type(given).__name__)
        raise RuntimeError(f"{kind} {name!r} raised {described(error)}") from error
    return outcome.value


def _ask(rollout_func: Callable[[list, Any], dict[str, Any]], prompts: list, method: SamplingMethod) -> dict[str, Any]:
    """Returns what a rollout_func returned for copies of the prompts.

    Raises:
        RuntimeError: it exited.
        ValueError: it returned no dict.
    """
    output = _called("rollout_func", rollout_func, lambda: rollout_func(copied(prompts), method))
    if not isinstance(output, Mapping):
        if inspect.iscoroutine(output):
            output.close()
        name = getattr(rollout_func, "__name__", type(rollout_func).__name__)
        raise ValueError(
            f"rollout_func {name!r} returned {shown(output)}; expected a dict with prompt_ids, completion_ids and "
            "logprobs, from a function that is not async"
        )
    return dict(output)


def _read_output(output: dict[str, Any], count: int) -> tuple[Rollout, dict[str, list]]:
    """Reads what a rollout_func returned: the rollout, and further columns, a single value for all completions too."""
    needed = ("prompt_ids", "completion_ids", "logprobs")
    missing = [name for name in needed if name not in output]
    if missing:
        raise ValueError(f"rollout_func returned {sorted(output)}; expected {', '.join(missing)} too")
    prompt_ids, completion_ids, logprobs = (output.pop(name) for name in needed)
    rollout = Rollout(prompt_ids, completion_ids, logprobs, mask=output.pop("env_mask", None))
    columns = {name: value if isinstance(value, list) else [value] * count for name, value in output.items()}
    for name, values in columns.items():
        if len(values) != count:
            raise ValueError(
                f"rollout_func returned {len(values)} values of {name!r} for {count} prompts; expected a list with "
                "one for each, or a single value that is no list"
            )
    return rollout, columns


def token_vectors(lists: list[list] | None) -> list[torch.Tensor] | None:
    """Returns a float32 vector (length,) a completion from its tokens' values, NaN for None; None stays None."""
    if lists is None:
        return None
    return [torch.tensor([torch.nan if value is None else float(value) for value in values]) for values in lists]
