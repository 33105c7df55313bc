"""Defines what the configs share whose trainers sample several completions of a prompt, for several updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .sampling_config import SamplingConfig

# What divides advantages: the standard deviation of rewards in the group, in the batch, or nothing.
SCALES = ("group", "batch", "none")


def scale_name(scale: str | bool) -> str:
    """Returns the name of `SCALES` that is meant, also by TRL's older True and False, or by these as text."""
    names = {True: "group", False: "none", "true": "group", "false": "none"}
    return str(names.get(scale.lower() if isinstance(scale, str) else scale, scale))


@dataclass
class GroupConfig(SamplingConfig):
    """Holds how many completions a prompt gets, when they are made, and how many updates learn from them.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    other_batch_size: ClassVar[str] = "cut groups of completions apart"

    num_generations: int = 8
    """Completions for each prompt; they are compared with each other."""

    num_generations_eval: int | None = None
    """Completions for each prompt in evaluation. None: num_generations."""

    generation_batch_size: int | None = None
    """Completions made at a time, in all processes. None: by steps_per_generation."""

    steps_per_generation: int | None = None
    """Micro-batches that one generation serves. None: gradient_accumulation_steps."""

    num_iterations: int = 1
    """Updates on the same completions (PPO's epochs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._divide_generations()

    def _divide_generations(self) -> None:
        """Fills in generation_batch_size and steps_per_generation from each other."""
        from trl_fast.settings.divisors import either, multiples_around

        per_step, size = self.per_device_train_batch_size * self.world_size, self.generation_batch_size
        shown = f"per_device_train_batch_size * processes = {self.per_device_train_batch_size} * {self.world_size}"
        if size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = per_step * self.steps_per_generation
        elif size % per_step:
            raise ValueError(
                f"generation_batch_size={size} is no multiple of {shown}; set it to "
                f"{either(multiples_around(size, per_step))}, or leave it out"
            )
        elif self.steps_per_generation not in (None, size // per_step):
            raise ValueError(
                f"generation_batch_size={size} and steps_per_generation={self.steps_per_generation} contradict each "
                f"other ({shown}); give one of them"
            )
        else:
            self.steps_per_generation = size // per_step
        self._check_groups(shown, given=size is not None)
        if self.eval_strategy != "no":
            self.check_eval_batch()

    def _check_groups(self, shown: str, *, given: bool) -> None:
        """Checks that a generation holds whole groups. given: whether its size was; shown: what a step has."""
        from trl_fast.settings.divisors import divisors, either, least_count, multiples_around

        size = self.completions_at_a_time * self.world_size
        if size % self.num_generations == 0:
            return
        if given:
            whole = math.lcm(self.num_generations, self.per_device_train_batch_size * self.world_size)
            remedy = f"generation_batch_size={either(multiples_around(size, whole))}"
        else:
            least = least_count(self.num_generations, size // self.per_device_train_batch_size)
            remedy = f"per_device_train_batch_size={least}"
        fewer = divisors(size, 2)
        raise ValueError(
            f"num_generations={self.num_generations} does not divide the {size} completions of a generation ({shown}, "
            f"times steps_per_generation={self.steps_per_generation}); use {remedy}"
            f"{f', or num_generations={either(fewer)}' if fewer else ''}"
        )

    def check_eval_batch(self) -> None:
        """Raises ValueError if a batch of the evaluation would not hold all completions of its prompts."""
        from trl_fast.settings.divisors import divisors, either, least_count

        evaluated = self.per_device_eval_batch_size * self.world_size
        count = self.generations("eval")
        if evaluated % count:
            raise ValueError(
                f"num_generations_eval={count} does not divide the {evaluated} completions of an evaluation batch "
                f"(per_device_eval_batch_size={self.per_device_eval_batch_size} * {self.world_size} processes); use "
                f"num_generations_eval={either(divisors(evaluated))}, or per_device_eval_batch_size="
                f"{least_count(count, self.world_size)}"
            )

    def generations(self, mode: str) -> int:
        """Returns the number of completions for each prompt in "train" or "eval"."""
        return (self.num_generations_eval or self.num_generations) if mode == "eval" else self.num_generations

    @property
    def _steps(self) -> int:
        assert self.steps_per_generation is not None, "it is filled in when the config is made"
        return self.steps_per_generation

    @property
    def generate_every(self) -> int:
        """Returns the number of micro-batches after which new completions are made."""
        return self._steps * self.num_iterations

    @property
    def completions_at_a_time(self) -> int:
        """Returns the completions that a process samples at a time, at most."""
        return self.per_device_train_batch_size * self._steps

    @property
    def is_on_policy(self) -> bool:
        """Says whether the policy of the update is always the one that sampled: each step makes new completions."""
        return self.gradient_accumulation_steps % self.generate_every == 0


@dataclass
class RewardedGroupConfig(GroupConfig):
    """Holds how rewards are weighed, and how far a policy may leave the one that sampled.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    epsilon: float = 0.2
    """How far the probability ratio may fall below 1, and rise above it, before it is clipped."""

    epsilon_high: float | None = None
    """How far the ratio may rise above 1. None: epsilon."""

    reward_weights: list[float] | None = None
    """Weights of the reward functions, one for each. None: 1 each."""

    reward_timeout: float | None = None
    """Seconds after which a reward function that has not answered is an error. None: no limit."""

    mask_truncated_completions: bool = False
    """Do not learn from completions that were cut off."""
