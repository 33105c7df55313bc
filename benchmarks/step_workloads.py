"""Makes the rows, completions and rewards of optimizer steps whose sizes alone matter: random tokens."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

# Completions of one prompt, TRL's default.
GENERATIONS = 8
# Letters that no merge of the tokenizer's joins: a token each.
_LETTERS = "QXZJKV"


class Shape(argparse.Namespace):
    """Holds a step's sizes. batch: rows (completions for GRPO); prompt and completion: tokens of each."""

    batch: int
    prompt: int
    completion: int


SHAPES = {
    "dpo": Shape(batch=8, prompt=512, completion=256),
    "sft": Shape(batch=8, prompt=0, completion=1024),
    "grpo": Shape(batch=32, prompt=256, completion=512),
}


def letters(rng: random.Random, count: int) -> str:
    """Returns a text of so many tokens."""
    return "".join(rng.choices(_LETTERS, k=count))


def rows(method: str, shape: Shape, count: int) -> Dataset:
    """Returns rows of the lengths of `shape`; of GRPO one a group."""
    rng = random.Random(0)
    if method == "sft":
        return Dataset.from_list([{"text": letters(rng, shape.completion)} for _ in range(count)])
    if method == "grpo":
        return Dataset.from_list([{"prompt": letters(rng, shape.prompt)} for _ in range(count // GENERATIONS)])
    fields = {"prompt": shape.prompt, "chosen": shape.completion, "rejected": shape.completion}
    return Dataset.from_list([{name: letters(rng, size) for name, size in fields.items()} for _ in range(count)])


def completions(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, list]]:
    """Returns a `rollout_func` that draws completions from the letters instead of generating them."""
    rng = random.Random(1)

    def rollout(prompts: list[str], trainer: Trainer) -> dict[str, list]:
        texts = [letters(rng, shape.completion) for _ in prompts]
        return {
            "prompt_ids": tokenizer(text=prompts)["input_ids"],
            "completion_ids": tokenizer(text=texts)["input_ids"],
            "logprobs": [[0.0] * shape.completion for _ in prompts],
        }

    return rollout


def random_rewards(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Returns rewards that differ within every group, so that every completion has a gradient."""
    return [random.Random(str(ids)).random() for ids in completion_ids]
