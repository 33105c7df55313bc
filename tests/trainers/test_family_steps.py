"""Steps of SFT, DPO and GRPO on models of every kind of layer: rows without padding beside padded ones."""

from __future__ import annotations

import pytest
import torch

import trl_fast
import trl_fast.data.packing as packing
from support.families import FAMILIES
from support.models import tiny_model
from support.rollouts import FixedRollout, color_prompts, vowels
from support.supervised import sft_rows
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.loading import disable_dropout

# One of each kind of layer and method by default: windows and sinks, shared keys, states.
BY_DEFAULT = {("gpt_oss", "DPO"), ("gemma4_text", "SFT"), ("qwen3_5_text", "GRPO")}
SETTINGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2, "learning_rate": 1e-4}
DATA = {
    "SFT": lambda: {"train_dataset": sft_rows("prompt and completion", 8)},
    "DPO": lambda: {"train_dataset": color_pairs(8)},
    "GRPO": lambda: {"train_dataset": color_prompts(8), "reward_funcs": vowels},
}
ONLINE = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1, "disable_dropout": True}


def model_of(family, tokenizer):
    changes = FAMILIES[family]
    sizes = {name: len(tokenizer) for name in changes if name.startswith("vocab_size")}
    model = tiny_model(family.split(",")[0], **{**changes, **sizes, "vocab_size": len(tokenizer)})
    # Its random numbers would be others in each layout.
    disable_dropout(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # States live for some tokens.
            if name.endswith("A_log"):
                parameter.uniform_(-3, -1)
    return model


def steps(method, family, layout, tokenizer, folder):
    """Trains two steps; returns their logs and the layout."""
    arguments = {"model": model_of(family, tokenizer), "processing_class": tokenizer, **DATA[method]()}
    settings = {**SETTINGS, "batch_layout": layout}
    if method == "GRPO":
        arguments["rollout_func"] = FixedRollout(tokenizer)
        settings |= ONLINE
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    trainer.train()
    return trainer.state.log_history[:-1], trainer.layout.name


CASES = [
    pytest.param(family, method, marks=[] if (family, method) in BY_DEFAULT else pytest.mark.slow)
    for family in FAMILIES
    for method in DATA
]


@pytest.mark.parametrize("family, method", CASES)
def test_steps_are_those_of_padded_rows(family, method, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    expected, _ = steps(method, family, "padded", tokenizer, tmp_path / "padded")
    got, layout = steps(method, family, "auto", tokenizer, tmp_path / "auto")
    assert layout == ("packed" if method == "SFT" else "shared_prefix")
    assert len(got) == 2 and all(entry["grad_norm"] > 0 for entry in got)
    timed = {"step_time"}
    assert_same_logs(
        *([{n: v for n, v in entry.items() if n not in timed} for entry in run] for run in (got, expected))
    )
