"""Two processes train on images as one does, also where the batch of one of them is text alone."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler

import trl_fast
from support.ranks import run_on_ranks
from support.training import SETTINGS
from support.vision_models import tiny_vision_model
from support.vision_processors import pictures, tiny_processor
from trl_fast.modeling.blank_images import tower_parameters
from trl_fast.modeling.loading import base_model, load_reward_model

pytestmark = pytest.mark.processes


class _InOrder:
    """Takes the rows as they come: of each two of them the second one has no image."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class DPOInOrder(_InOrder, trl_fast.DPOTrainer):
    pass


class RewardInOrder(_InOrder, trl_fast.RewardTrainer):
    pass


def message(role, text):
    return [{"role": role, "content": text}]


def rows():
    said = {"chosen": message("assistant", "It is blue and red."), "rejected": message("assistant", "green")}
    shown = [pictures(1), [], pictures(2, seed=1), []]
    return [{"images": each, "prompt": message("user", "What color?" * (1 + bool(each))), **said} for each in shown]


def train(family, folder, batch_size, *, trains="all"):
    """The numbers of each step and of an evaluation.

    trains: all weights, text (all but the tower's), adapter (one of all layers); rewards: all, of a reward model.
    """
    model = tiny_vision_model(family)
    trainer_class, config_class = DPOInOrder, trl_fast.DPOConfig
    if trains == "rewards":
        model.save_pretrained(folder / "model")
        torch.manual_seed(0)
        model = load_reward_model(str(folder / "model"))
        trainer_class, config_class = RewardInOrder, trl_fast.RewardConfig
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if trains == "adapter" else None
    if trains == "text":
        for weight in tower_parameters(base_model(model)):
            weight.requires_grad_(False)
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "gradient_accumulation_steps": 1}
    settings |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    trainer = trainer_class(
        model=model,
        args=config_class(str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows()),
        eval_dataset=Dataset.from_list(rows()),
        processing_class=tiny_processor(family),
        peft_config=config,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return [*((log["loss"], log["grad_norm"]) for log in logs), (trainer.evaluate()["eval_loss"], 0.0)]


QUICK = ("qwen2_5_vl", "ddp", "all")
SLOW = [("qwen2_5_vl", *case) for case in product(("ddp", "fsdp2", "zero3"), ("all", "text", "adapter"))]
SLOW += [("qwen2_5_vl", engine, "all") for engine in ("fsdp1", "zero1", "zero2")] + [("paligemma", "ddp", "all")]
SLOW += [("qwen2_5_vl", engine, "rewards") for engine in ("ddp", "fsdp2", "zero3")]
SLOW += [(*case, "all") for case in product(("gemma3", "gemma4", "llava", "qwen3_vl"), ("ddp", "fsdp2"))]


@pytest.mark.parametrize(
    ("family", "engine", "trains"),
    [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case != QUICK)],
)
def test_a_process_without_images_is_not_waited_for(family, engine, trains, tmp_path):
    """Under sharding it gathers the tower's weights with the others, under DDP the tower's gradients are zeros."""
    found = run_on_ranks(partial(train, family, tmp_path / "two", 1, trains=trains), engine=engine)
    expected = train(family, tmp_path / "one", 2, trains=trains)
    for steps in found:
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-5, atol=1e-6)
