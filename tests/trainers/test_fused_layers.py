"""Training with fused layers: the numbers of a run without them."""

from __future__ import annotations

import pytest
from transformers.models.llama import modeling_llama

import trl_fast
from support.models import tiny_model
from support.training import assert_same_logs, color_pairs, make_trainer
from trl_fast.modeling.fused_layers import FUSED_LAYERS
from trl_fast.modeling.model_changes import changes_of


@pytest.fixture(autouse=True)
def _own_function(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def run(tokenizer, output_dir, method="DPO", **settings):
    model = tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    rows = color_pairs(8) if method == "DPO" else color_pairs(8).map(lambda row: {"completion": row["chosen"]})
    rows = rows if method == "DPO" else rows.remove_columns(["chosen", "rejected"])
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": rows}
    trainer = make_trainer(trl_fast, output_dir, method=method, arguments=arguments, **settings)
    trainer.train()
    return model, trainer.state.log_history


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("SFT", {}),
        ("DPO", {}),
        ("DPO", {"batch_layout": "padded", "tiled_mlp": 16}),
        ("DPO", {"gradient_checkpointing_kwargs": {"selective": True}, "activation_budget_bytes": 0}),
    ],
    ids=["sft", "dpo", "padded-tiled", "selective"],
)
def test_three_steps(method, settings, tokenizer, tmp_path):
    _, expected = run(tokenizer, tmp_path, method, **settings)
    model, got = run(tokenizer, tmp_path, method, fused_layers=True, **settings)
    assert FUSED_LAYERS in changes_of(model)
    assert_same_logs(got, expected, rel=1e-5, abs=1e-6)


def test_not_beside_liger(tmp_path):
    with pytest.raises(ValueError, match="fused_layers=True: use_liger_kernel=True fuses the same layers"):
        trl_fast.SFTConfig(str(tmp_path), use_liger_kernel=True, fused_layers=True)
