"""Describes the methods whose steps `benchmarks.step` times: trainers, rows of real text, and how an update is fed."""

from __future__ import annotations

import argparse
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
)

from trl_fast.rollout import Rollout, SamplingSettings

from .english_text import continuations, cut_continuations, passages, token_stream
from .picture_rows import PicturePrompts, tokenizer_of
from .step_workloads import GENERATIONS, random_rewards

OURS, TRL = "trl_fast", "trl"
Rows = Callable[[argparse.Namespace, PreTrainedTokenizerBase, int], Dataset]


@dataclass(frozen=True)
class Method:
    """Describes a method.

    - `stem`: of the names of its config and trainer.
    - `rows`: makes the rows of so many texts, pairs or completions.
    - `trl_module`: where TRL 1.16.0 has them; None: nowhere, and ours runs alone.
    - `changed`: makes TRL's trainer take the arguments that ours takes.
    - `model_class`, `model_options`: how the model is loaded.
    - `config`: what the config is given, of the command's arguments.
    - `trainer`: what the trainer is given, of those and the tokenizer or processor.
    - `group`: completions of a prompt, where a step is an update on completions, whose number is the batch's; 0: a
      step is on rows.
    """

    stem: str
    rows: Rows
    trl_module: str | None = TRL
    changed: Callable[[Any], type] = lambda trainer: trainer
    model_class: type = AutoModelForCausalLM
    model_options: tuple[tuple[str, Any], ...] = ()
    config: Callable[[argparse.Namespace], dict[str, Any]] = lambda arguments: {"max_length": arguments.max_length}
    trainer: Callable[[argparse.Namespace, Any], dict[str, Any]] = lambda *_: {}
    group: int = 0

    @property
    def libraries(self) -> tuple[str, ...]:
        """Returns whose trainers there are: `OURS`, and `TRL` where it has one."""
        return (OURS, TRL) if self.trl_module else (OURS,)

    def classes(self, library: str) -> tuple[type, type]:
        """Returns config and trainer of one of the libraries."""
        module = importlib.import_module(OURS if library == OURS else str(self.trl_module))
        config, trainer = (getattr(module, f"{self.stem}{kind}") for kind in ("Config", "Trainer"))
        return config, trainer if library == OURS else self.changed(trainer)


# ---- rows


def _passages(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    if not arguments.completion_tokens:
        # A passage has 64 tokens at least, on average some 300.
        return passages(count * (arguments.max_length // 128 if arguments.packing else 1))
    pairs = cut_continuations(count, arguments.prompt_tokens, arguments.completion_tokens, tokenizer)
    return pairs.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=pairs.column_names)


def _pairs(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    if not arguments.completion_tokens:
        return continuations(count)
    return cut_continuations(count, arguments.prompt_tokens, arguments.completion_tokens, tokenizer)


def _whole_pairs(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    """Joins prompt and completion: a reward model of TRL's reads them as one text."""
    return _pairs(arguments, tokenizer, count).map(
        lambda row: {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
        remove_columns="prompt",
    )


def _triples(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    """Adds the reference that TPO learns from: the chosen completion of the row before."""
    pairs = _pairs(arguments, tokenizer, count)
    chosen = list(pairs["chosen"])
    return pairs.add_column("reference", chosen[-1:] + chosen[:-1])


def _labelled(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    """Takes pairs apart, good and bad in turns."""
    pairs = _pairs(arguments, tokenizer, -(-count // 2))
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ]
    )


def _prompts(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    group = METHODS[arguments.method].group
    pairs = cut_continuations(-(-count // group), arguments.prompt_tokens, arguments.completion_tokens, tokenizer)
    return pairs.select_columns("prompt")


# ---- completions of an update


class CutCompletions:
    """Serves as a `rollout_func` and as an engine: for every prompt so many consecutive tokens of the text."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.length = tokenizer, arguments.completion_tokens
        self.stream, self.rng = token_stream(tokenizer).tolist(), random.Random(0)

    def completions(self, prompts: list) -> list[list[int]]:
        """Returns a completion for each prompt."""
        firsts = [self.rng.randrange(len(self.stream) - self.length) for _ in prompts]
        return [self.stream[first : first + self.length] for first in firsts]

    def __call__(self, prompts: list[str], trainer: Trainer) -> dict[str, list]:
        """Returns prompts and completions as TRL asks for them."""
        return {
            "prompt_ids": self.tokenizer(text=prompts)["input_ids"],
            "completion_ids": self.completions(prompts),
            "logprobs": [[0.0] * self.length for _ in prompts],
        }

    def generate(self, prompt_ids: list[list[int]], settings: SamplingSettings) -> Rollout:
        """Returns the prompts with completions, as an engine does."""
        return Rollout(prompt_ids, self.completions(prompt_ids))

    def sync_weights(self, model: Any, step: int) -> None:
        """Leaves the weights where they are: the completions do not depend on them."""


def _with_rollout_func(trainer_class: Any) -> type:
    """Returns TRL's RLOOTrainer with the `rollout_func` that its GRPOTrainer has."""

    class WithRolloutFunc(trainer_class):
        def __init__(self, *args: Any, rollout_func: CutCompletions, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self._completions = rollout_func.completions

        def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
            return self._completions(prompt_ids)

    return WithRolloutFunc


def _with_given_completions(trainer_class: Any) -> type:
    """Returns TRL's SDPOTrainer with the `rollout_func` that its GRPOTrainer has."""

    class WithGivenCompletions(trainer_class):
        def __init__(self, *args: Any, rollout_func: CutCompletions, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self._completions = rollout_func.completions

        def _generate_transformers(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            return prompt_ids, self._completions(prompt_ids)

    return WithGivenCompletions


def _group_config(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"max_completion_length": arguments.completion_tokens, "num_generations": GENERATIONS}


def _group_trainer(
    arguments: argparse.Namespace, processor: PreTrainedTokenizerBase | ProcessorMixin
) -> dict[str, Any]:
    rollout: Any = CutCompletions(arguments, tokenizer_of(processor))
    if arguments.images:
        rollout = PicturePrompts(processor, rollout)
    return {"rollout_func": rollout, "reward_funcs": random_rewards}


def _ppo_trainer(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    value_model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1)
    return {
        "rollout_engine": CutCompletions(arguments, tokenizer),
        "reward_model": random_rewards,
        "value_model": value_model,
    }


METHODS = {
    "sft": Method(
        "SFT",
        _passages,
        config=lambda arguments: {"max_length": arguments.max_length, "packing": arguments.packing},
    ),
    "dpo": Method("DPO", _pairs),
    "kto": Method("KTO", _labelled),
    "bco": Method("BCO", _labelled, trl_module=None),
    "orpo": Method("ORPO", _pairs, trl_module="trl.experimental.orpo"),
    "cpo": Method("CPO", _pairs, trl_module="trl.experimental.cpo"),
    "tpo": Method("TPO", _triples, trl_module="trl.experimental.tpo"),
    "reward": Method(
        "Reward",
        _whole_pairs,
        model_class=AutoModelForSequenceClassification,
        model_options=(("num_labels", 1),),
    ),
    "grpo": Method("GRPO", _prompts, config=_group_config, trainer=_group_trainer, group=GENERATIONS),
    "gmpo": Method(
        "GMPO",
        _prompts,
        trl_module="trl.experimental.gmpo",
        config=_group_config,
        trainer=_group_trainer,
        group=GENERATIONS,
    ),
    "rloo": Method(
        "RLOO",
        _prompts,
        changed=_with_rollout_func,
        config=_group_config,
        trainer=_group_trainer,
        group=GENERATIONS,
    ),
    "sdpo": Method(
        "SDPO",
        _prompts,
        trl_module="trl.experimental.sdpo",
        changed=_with_given_completions,
        # One of two random rewards is a success.
        config=lambda arguments: {**_group_config(arguments), "success_reward_threshold": 0.5},
        trainer=_group_trainer,
        group=GENERATIONS,
    ),
    "ppo": Method(
        "PPO",
        _prompts,
        trl_module=None,
        config=lambda arguments: {"response_length": arguments.completion_tokens, "num_ppo_epochs": 1},
        trainer=_ppo_trainer,
        group=1,
    ),
}
