"""Layers that a GPU leaves uncheckpointed change no number of a training run."""

import pytest
from peft import LoraConfig

import trl_fast
from benchmarks.checkpointing import MadeUpMemory
from support.models import tiny_classifier, tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.selective_checkpointing import SelectiveCheckpointing

LAYERS, KEPT = 3, 2
RUNS = {
    "dpo": ("DPO", {}),
    "adapter": ("DPO", {"lora": True}),
    "sft": ("SFT", {}),
    "reward": ("Reward", {}),
    "router": ("DPO", {"family": "mixtral", "router_aux_loss_coef": 0.1}),
}


def logs(name, output_dir, tokenizer):
    method, settings = RUNS[name]
    settings = dict(settings)
    build = tiny_classifier if method == "Reward" else tiny_model
    family = settings.pop("family", "llama")
    special = {"num_local_experts": 4, "sliding_window": None} if family == "mixtral" else {}
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM") if settings.pop("lora", False) else None
    rows = color_pairs(16)
    if method == "SFT":
        rows = rows.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=rows.column_names)
    arguments = {
        "model": build(family, vocab_size=len(tokenizer), num_hidden_layers=LAYERS, **special),
        "processing_class": tokenizer,
        "train_dataset": rows,
        "eval_dataset": rows.select(range(4)),
        "peft_config": lora,
    }
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(trl_fast, output_dir, method=method, arguments=arguments, **settings)
    trainer.train()
    return trainer.state.log_history


@pytest.mark.parametrize("name", RUNS)
def test_the_same_training(name, tokenizer, tmp_path, monkeypatch):
    expected = logs(name, tmp_path, tokenizer)
    whole = []
    share_out = SelectiveCheckpointing._share

    def seen(self, layers, count, limit):
        whole.append(count)
        share_out(self, layers, count, limit)

    memories = {}
    monkeypatch.setattr(SelectiveCheckpointing, "_share", seen)
    monkeypatch.setattr(
        SelectiveCheckpointing,
        "device_memory",
        property(lambda self: memories.setdefault(id(self), MadeUpMemory(KEPT))),
    )
    got = logs(name, tmp_path, tokenizer)
    assert_same_logs(got, expected, rel=0, abs=0)
    # Three steps of two passes; where rows grow longer they are measured anew.
    assert len(whole) == 6 and whole[0] == 0 and 0 < max(whole) <= KEPT
