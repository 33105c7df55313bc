"""Forecasts of runs that are about to start: from the trainer's own model, arguments and data."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_fast
from support.models import tiny_config
from support.tokenizer import build_tokenizer
from trl_fast.planning import forecast as module
from trl_fast.planning.forecast import forecast
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TrainingSetup

pytestmark = pytest.mark.plans

PROMPT, ANSWER = 24, 40


@pytest.fixture(autouse=True)
def _simulates_tiny_models(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 0)


def trainer_of(folder, **changes):
    row = {"prompt_ids": [5] * PROMPT, "chosen_ids": [6] * ANSWER, "rejected_ids": [7] * (ANSWER - 8)}
    args = trl_fast.DPOConfig(
        str(folder), per_device_train_batch_size=2, use_cpu=True, bf16=True, report_to="none", **changes
    )
    return trl_fast.DPOTrainer(
        AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def test_a_forecast_is_the_plan_of_the_trainers_own_run(tmp_path):
    trainer = trainer_of(tmp_path)
    random = torch.get_rng_state()
    found = forecast(trainer)
    assert torch.equal(torch.get_rng_state(), random)
    setup = TrainingSetup(
        trainer.model.config,
        method="dpo",
        prompt_share=PROMPT / (PROMPT + ANSWER),
        per_device_train_batch_size=2,
        dtype="float32",
        lora_r=4,
        lora_target_modules="all-linear",
        device="cpu",
    )
    # max_length is 1024; the data are shorter.
    assert found.peak_bytes == simulate(setup, PROMPT + ANSWER).peak().bytes
    assert found.step_seconds is None and "64 tokens" in found.note and "CPU" in found.note


def test_rows_with_images_are_left_to_a_plan(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.images = object()
    found = forecast(trainer)
    assert found.peak_bytes is None and found.note.endswith("see trl-fast plan --image_size)")


def test_longer_rows_are_cut_to_max_length(tmp_path):
    assert "sequences of 32 tokens" in forecast(trainer_of(tmp_path, max_length=32)).note


def test_what_cannot_be_simulated_is_told_and_stops_nothing(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(module, "stage_peaks", lambda *_: (_ for _ in ()).throw(RuntimeError("an odd operator")))
    found = forecast(trainer)
    assert found.peak_bytes is None and "it cannot be simulated (an odd operator)" in found.note
    monkeypatch.setattr(module, "FEWEST_WEIGHTS", 10**9)
    assert "too small to simulate" in forecast(trainer).note


def test_a_known_gpu_gets_a_time(tmp_path, monkeypatch):
    class Properties:
        total_memory = int(79.2 * 2**30)

    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)
    setup = module._setup(trainer).but(device="gpu")
    found = module._simulated(setup)
    assert "NVIDIA H100 SXM" in found.note and 0.001 < found.step_seconds < 1
    # All layers go uncheckpointed there.
    assert found.peak_bytes > simulate(setup, setup.max_length).peak().bytes
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Another GPU")
    found = module._simulated(setup)
    assert found.step_seconds is None and "the speed of Another GPU is not known" in found.note
