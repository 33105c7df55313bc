"""Short training runs of a trainer, ours or TRL's, and their logs side by side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import ModuleType

import pytest
from datasets import Dataset
from transformers import set_seed

# Wall-clock figures, and a count of operations that depends on the layout.
NOT_COMPARED = ("runtime", "per_second", "total_flos", "model_preparation_time")

SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def made_once(make: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Makes a dataset once for each of its arguments, and gives copies of it: trainers may set their format."""
    made = functools.cache(make)
    return functools.wraps(make)(lambda *given, **named: copy.copy(made(*given, **named)))


@made_once
def color_pairs(count: int = 24) -> Dataset:
    """Plain preference pairs of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": f"What color is {i}?",
                "chosen": f" It is blue {i * 7}" * (1 + i % 3),
                "rejected": f" green, {i}" * (1 + i % 2),
            }
            for i in range(count)
        ]
    )


@made_once
def color_labels(count: int = 24) -> Dataset:
    """Plain completions with labels: four good ones, four bad ones, then both in every four."""
    return Dataset.from_list(
        [
            {
                "prompt": f"What color is {i}?",
                "completion": (f" It is blue {i * 7}" if i % 3 else f" green, {i}") * (1 + i % 4),
                "label": i < 4 or (i >= 8 and i % 3 > 0),
            }
            for i in range(count)
        ]
    )


def make_trainer(module: ModuleType, output_dir: object, *, method: str = "DPO", arguments: dict, **settings: object):
    """`module`'s trainer of a method with the settings above; the seed is set first, for adapters' random weights."""
    config = getattr(module, f"{method}Config")(str(output_dir), **{**SETTINGS, **settings})
    set_seed(config.seed)
    return getattr(module, f"{method}Trainer")(args=config, **arguments)


def assert_same_logs(got: list[dict], expected: list[dict], rel: float = 1e-4, abs: float = 1e-5) -> None:
    """Every logged value of every step, under the same names in the same order."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            if not any(part in name for part in NOT_COMPARED):
                wanted = None if value is None else pytest.approx(value, rel=rel, abs=abs)
                assert ours[name] == wanted, f"{name} at step {theirs.get('step')}"
