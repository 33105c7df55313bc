"""Two processes whose weights FSDP shards train as one does: losses, gradients, weights, references, checkpoints."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import trl_fast
from support.models import tiny_classifier, tiny_model
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.tokenizer import build_tokenizer
from support.training import color_labels, color_pairs, make_trainer
from trl_fast.parallel.weights import whole_weights

ROWS = {
    "SFT": lambda: sft_rows("prompt and completion", 12),
    "DPO": lambda: color_pairs(12),
    "KTO": lambda: color_labels(12),
    "Reward": lambda: color_pairs(12),
}
# Plain steps: Adam makes of a rounding a step where a gradient is nearly nothing.
SETTINGS = {"gradient_accumulation_steps": 1, "max_steps": 2, "optim": "sgd", "learning_rate": 0.05}
# KTO pairs completions with others of a device's batch, so that it is held against two processes of DDP.
OTHER = {"SFT": None, "DPO": None, "KTO": "ddp", "Reward": None}


def make(method, folder, *, batch_size=2, family="llama", lora=False, **settings):
    tokenizer = build_tokenizer()
    model = (tiny_classifier if method == "Reward" else tiny_model)(family, vocab_size=len(tokenizer))
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": ROWS[method]()}
    if lora:
        task = "SEQ_CLS" if method == "Reward" else "CAUSAL_LM"
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task)
    settings = {**SETTINGS, "per_device_train_batch_size": batch_size, **settings}
    return make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)


def read(trainer):
    """The numbers of each step's log, and the weights by name; empty where this process has none."""
    steps = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    return steps, {name: weight.clone() for name, weight in whole_weights(trainer.accelerator, trainer.model).items()}


def train(*args, **settings):
    trainer = make(*args, **settings)
    trainer.train()
    return read(trainer)


def assert_same(got, expected):
    steps, weights = got
    torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected[0]), rtol=5e-7, atol=1e-7)
    assert weights.keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(
            weights[name], weight, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("method", ROWS)
def test_two_processes_train_as_one(method, tmp_path):
    first, second = run_on_ranks(train, method, tmp_path / "two", engine="fsdp2")
    if OTHER[method] is None:
        other = train(method, tmp_path / "one", batch_size=4)
    else:
        other = run_on_ranks(train, method, tmp_path / "one", engine=OTHER[method])[0]
    assert_same(first, other)
    assert first[0] == second[0]
