"""Simulated peaks against measured ones of real steps of the trainers on this CPU."""

import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trl_fast
from benchmarks.memory import measure_peak
from support.models import tiny_config
from support.tokenizer import build_tokenizer
from trl_fast.ops.backends import load_extension
from trl_fast.planning.setup import Setup
from trl_fast.planning.step import simulate
from trl_fast.planning.timeline import KINDS, OPTIMIZER, REFERENCE, WEIGHTS

SIZES = {
    "small": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "head_dim": 32},
    "wide": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "head_dim": 64},
    "wide MLP": {"hidden_size": 64, "intermediate_size": 2048, "num_hidden_layers": 2, "head_dim": 16},
}
TRAINERS = {
    "dpo": (trl_fast.DPOTrainer, trl_fast.DPOConfig, AutoModelForCausalLM),
    "sft": (trl_fast.SFTTrainer, trl_fast.SFTConfig, AutoModelForCausalLM),
    "reward": (trl_fast.RewardTrainer, trl_fast.RewardConfig, AutoModelForSequenceClassification),
}
# What is there before a step and after it.
RESIDENT = (WEIGHTS, REFERENCE, OPTIMIZER)


def rows_of(method, length, count):
    prompt, answer = [5] * (length // 2), length - length // 2
    chosen, rejected = [6] * answer, [7] * answer
    row = {
        "dpo": {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected},
        "sft": {"input_ids": prompt + chosen},
        "reward": {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected},
    }
    return Dataset.from_list([row[method]] * count)


def make_trainer(setup, length, folder):
    trainer_class, config_class, auto = TRAINERS[setup.method]
    options = {"num_labels": 1} if setup.method == "reward" else {}
    model = auto.from_config(type(setup.config)(**{**setup.config.to_dict(), **options}), dtype=setup.torch_dtype)
    extra = {"precompute_ref_log_probs": setup.precompute_ref_log_probs} if setup.method == "dpo" else {}
    args = config_class(
        str(folder),
        max_length=length,
        per_device_train_batch_size=setup.per_device_train_batch_size,
        gradient_checkpointing=setup.gradient_checkpointing,
        batch_layout=setup.batch_layout,
        tiled_mlp=setup.tiled_mlp,
        bf16=setup.bf16,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
        **extra,
    )
    lora = None
    if setup.lora_r is not None:
        task = "SEQ_CLS" if setup.method == "reward" else "CAUSAL_LM"
        lora = LoraConfig(r=setup.lora_r, target_modules=setup.lora_target_modules, task_type=task)
    rows = rows_of(setup.method, length, setup.per_device_train_batch_size)
    return trainer_class(model, args=args, train_dataset=rows, processing_class=build_tokenizer(), peft_config=lora)


def measured_peak(setup, length, folder):
    """Bytes of tensors at the peak of the second step, beyond those that live before it."""
    trainer = make_trainer(setup, length, folder)
    trainer.create_optimizer()
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model).train()
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        trainer.training_step(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    step()
    gc.collect()
    return measure_peak(step).peak_bytes


@pytest.fixture(autouse=True)
def nothing_held():
    """Memory that our ops hold between calls may be up to twice what the next call asks for."""
    if load_extension().ok:
        from trl_fast import _C

        _C.release_held_memory()


@pytest.mark.parametrize(
    "size, length, changes",
    [
        pytest.param("small", 64, {}, marks=pytest.mark.slow),
        ("small", 384, {"per_device_train_batch_size": 3, "dtype": "float32", "bf16": False}),
        ("wide", 192, {"gradient_checkpointing": False, "batch_layout": "packed"}),
        ("wide", 256, {"dtype": "float32", "batch_layout": "padded", "precompute_ref_log_probs": True}),
        ("wide MLP", 384, {"tiled_mlp": 128, "precompute_ref_log_probs": True}),
        ("wide", 256, {"lora_r": 8, "lora_target_modules": "all-linear"}),
        ("small", 256, {"method": "sft", "per_device_train_batch_size": 3}),
        ("wide", 256, {"method": "reward"}),
    ],
    ids=str,
)
def test_simulated_peaks_are_those_of_real_steps(size, length, changes, tmp_path):
    config = tiny_config("llama", vocab_size=4096, max_position_embeddings=2048, **SIZES[size])
    setup = Setup(config, device="cpu", **changes)
    timeline = simulate(setup, length)
    resident = sum(timeline.levels[KINDS.index(kind)].max() for kind in RESIDENT)
    simulated = timeline.peak().bytes - resident
    # 10% is what was asked for; it is nearer to 0.1%.
    assert simulated == pytest.approx(measured_peak(setup, length, tmp_path), rel=0.02)
