"""Runs of GRPO and RLOO on prompts with images, ours and TRL's, with the same completions."""

from __future__ import annotations

from typing import Any

import trl
from datasets import Dataset

import trl_fast
from support.rollouts import FixedImageRollout
from support.training import make_trainer
from support.vision_processors import pictures, tiny_processor

# With a larger epsilon no update of a weight is the sign of a gradient that is 0 but for rounding.
SETTINGS = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.8, "max_steps": 2, "adam_epsilon": 1e-2}


def picture_prompts(count: int = 8, mixed: bool = False) -> Dataset:
    """The same few words about one or two pictures; mixed: every third prompt has none."""
    pairs = zip(pictures(count), pictures(count, (84, 56), seed=50), strict=True)
    own = [[] if mixed and i % 3 == 2 else list(pair)[: 1 + i % 2] for i, pair in enumerate(pairs)]
    prompt = [{"role": "user", "content": "What is it?"}]
    return Dataset.from_list([{"prompt": prompt, "images": images, "shade": i} for i, images in enumerate(own)])


def brightness(prompts, completions, images, shade, **_) -> list[float]:
    """A reward that depends on all that a reward function is given."""
    rewards = []
    for prompt, completion, own, value in zip(prompts, completions, images, shade, strict=True):
        parts = prompt[0]["content"]
        shown = [part["image"] for part in parts if part["type"] == "image"] if isinstance(parts, list) else []
        assert [each.tobytes() for each in shown] == [each.tobytes() for each in own]
        light = sum(each.resize((1, 1)).convert("L").getpixel((0, 0)) for each in own)
        rewards.append(len(completion[-1]["content"]) * (1 + value % 2) + light / 100)
    return rewards


def trained(
    module,
    output_dir,
    method: str,
    family: str,
    path: str,
    monkeypatch,
    *,
    trainer_class: type | None = None,
    samples: bool = False,
    mixed: bool = False,
    resume: str | None = None,
    **settings: Any,
):
    """A trainer after its run, by fixed completions unless it samples itself."""
    rollout = FixedImageRollout(tiny_processor(family))
    arguments: dict[str, Any] = {
        "model": path,
        "reward_funcs": brightness,
        "train_dataset": picture_prompts(mixed=mixed),
    }
    if not samples and (method == "GRPO" or module is trl_fast):
        arguments["rollout_func"] = rollout
    elif not samples:
        generate = lambda trainer, ids, *_: rollout.completions(ids)  # noqa: E731
        monkeypatch.setattr(trl.RLOOTrainer, "_generate_single_turn", generate)
    if trainer_class is not None:
        monkeypatch.setattr(module, f"{method}Trainer", trainer_class)
    settings = {**SETTINGS, **settings}
    steps = settings.pop("max_steps")
    trainer = make_trainer(module, output_dir, method=method, arguments=arguments, max_steps=max(steps, 1), **settings)
    if steps:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs_of(trainer) -> list[dict]:
    """Everything that a run logged, but for its times."""
    return [{name: value for name, value in log.items() if name != "step_time"} for log in trainer.state.log_history]
