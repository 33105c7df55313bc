"""Sequence parallelism that cannot be is refused with field, value and remedy, before training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from peft import PromptTuningConfig, get_peft_model

from support.models import tiny_model
from trl_fast.modeling.layouts import ChosenLayout
from trl_fast.trainers.base.sequence_parallel import SharedRows, take_sequence_group


def refuse(model, *, method="dpo", layout="packed", world=2, images=None, **sizes):
    args = SimpleNamespace(world_size=world, process_index=0, parallelism_config=ParallelismConfig(**sizes))
    trainer = SimpleNamespace(method=method, layout=ChosenLayout(layout), images=images)
    with pytest.raises(ValueError, match=f"^parallelism_config: sp_size={sizes['sp_size']} cannot be used: ") as error:
        take_sequence_group(trainer, args, model)
    return str(error.value)


def test_what_cannot_share_rows_is_refused():
    model = tiny_model()
    assert "3 processes are no multiple of it; start 2" in refuse(model, sp_size=2, world=3)
    assert "it is not combined with tp_size" in refuse(model, sp_size=2, tp_size=2, world=4)
    assert "grpo does more with a row than to score it; use it with one of sft, dpo, orpo, cpo, tpo" in refuse(
        model, sp_size=2, method="grpo"
    )
    assert "batch_layout='padded' has several rows" in refuse(model, sp_size=2, layout="padded")
    assert "the dataset has images, whose tokens are those of whole rows" in refuse(model, sp_size=2, images="some")
    heads = "LlamaForCausalLM has 4 attention heads, which are not dealt evenly to 3 processes"
    assert heads in refuse(model, sp_size=3, world=3)
    groups = "LlamaForCausalLM has 2 key-value heads, which are not dealt evenly to 3 processes"
    assert groups in refuse(tiny_model(num_attention_heads=6, hidden_size=48), sp_size=3, world=3)
    tuned = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "virtual tokens" in refuse(tuned, sp_size=2)
    model.trl_fast_fused_head = False
    assert "the model's own logits are scored" in refuse(model, sp_size=2)


def test_a_launcher_that_asks_for_it_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    args = SimpleNamespace(world_size=2, process_index=0, parallelism_config=None)
    with pytest.raises(ValueError, match="sp_size=2 cannot be used: the launcher's environment asks for it; set par"):
        take_sequence_group(SimpleNamespace(method="sft"), args, tiny_model())


def test_shared_rows_have_no_sampler_to_skip_by():
    rows = SharedRows([1, 2, 3], SimpleNamespace(size=4))
    assert len(rows) == 12
    with pytest.raises(ValueError, match="resume_from_checkpoint with sp_size: .*; set ignore_data_skip=True"):
        _ = rows.sampler
