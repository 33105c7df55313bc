"""Checkpoints of models that read images: with the processor, and a resumed run is the unbroken one bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoProcessor

import trl_fast
from support.resuming import assert_resumes
from support.training import SETTINGS
from support.vision_processors import pictures, save_tiny_vision_model, tiny_processor

SHOWN = pictures(3)


def message(role, text):
    return [{"role": role, "content": text}]


def make(model, lora, folder, **settings):
    said = {"chosen": message("assistant", "It is blue and red."), "rejected": message("assistant", "green")}
    rows = [{"images": each, "prompt": message("user", "What color?"), **said} for each in (SHOWN[:1], SHOWN[1:], [])]
    values = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "gradient_accumulation_steps": 1}
    return trl_fast.DPOTrainer(
        model=model,
        args=trl_fast.DPOConfig(str(folder), **{**SETTINGS, **values, "per_device_train_batch_size": 2, **settings}),
        train_dataset=Dataset.from_list(rows * 2),
        processing_class=tiny_processor("qwen2_5_vl"),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    )


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["full", "lora"])
def test_a_resumed_run_is_the_unbroken_one(lora, tmp_path):
    """The processor of each folder makes of an image what the given one makes of it."""
    model = save_tiny_vision_model(tmp_path / "model", "qwen2_5_vl")
    make_trainer = partial(make, model, lora)
    assert_resumes(make_trainer, tmp_path / "run", (1,))
    make_trainer(tmp_path / "run", max_steps=0).save_model()
    wanted = tiny_processor("qwen2_5_vl")(text="<|image_pad|>", images=SHOWN[:1], return_tensors="pt")
    for folder in ("checkpoint-1", "checkpoint-2", "."):
        found = AutoProcessor.from_pretrained(tmp_path / "run" / folder)
        got = found(text="<|image_pad|>", images=SHOWN[:1], return_tensors="pt")
        assert all(torch.equal(got[name], wanted[name]) for name in ("pixel_values", "image_grid_thw"))
        assert found.chat_template == tiny_processor("qwen2_5_vl").chat_template
