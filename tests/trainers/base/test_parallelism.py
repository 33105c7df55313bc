"""Parallelism that is not served is refused with field, value and remedy, before anything is loaded or trained."""

from __future__ import annotations

import pytest
from accelerate import ParallelismConfig
from transformers.distributed import DistributedConfig

import trl_fast
from support.models import tiny_model
from support.training import color_pairs

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "field, why",
    [("cp_size", "sequences which are packed into one row"), ("sp_size", "packed rows"), ("tp_size", "vocabulary")],
)
def test_arguments_that_ask_for_it_are_refused(tmp_path, field, why):
    args = trl_fast.DPOConfig(str(tmp_path), **CPU, parallelism_config=ParallelismConfig(**{field: 2}))
    with pytest.raises(ValueError, match=f"parallelism_config: {field}=2 cannot be used: .*{why}.*leave it out"):
        trl_fast.DPOTrainer("no such model", args=args, train_dataset=color_pairs(4))


def test_a_launcher_that_asks_for_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    args = trl_fast.SFTConfig(str(tmp_path), **CPU)
    with pytest.raises(ValueError, match="parallelism_config: cp_size=4 cannot be used"):
        trl_fast.SFTTrainer("no such model", args=args, train_dataset=color_pairs(4))


def test_data_parallelism_is_not_refused(tmp_path):
    args = trl_fast.SFTConfig(str(tmp_path), **CPU, parallelism_config=ParallelismConfig(dp_shard_size=2))
    with pytest.raises(OSError, match="no such model"):
        trl_fast.SFTTrainer("no such model", args=args, train_dataset=color_pairs(4))


@pytest.mark.parametrize("field", ["tp_size", "pp_size", "ep_size", "fsdp_size"])
def test_a_model_that_was_sharded_so_is_refused(tmp_path, tokenizer, field):
    model = tiny_model(vocab_size=len(tokenizer))
    sizes = {"tp_size": 2, "fsdp_size": 1} if field == "tp_size" else {"fsdp_size": 2} if field == "ep_size" else {}
    model.config.distributed_config = DistributedConfig(**{**sizes, field: 2})
    args = trl_fast.DPOConfig(str(tmp_path), **CPU)
    with pytest.raises(ValueError, match=f"distributed_config: {field}=2 cannot be used: .*; "):
        trl_fast.DPOTrainer(model, args=args, train_dataset=color_pairs(4), processing_class=tokenizer)
