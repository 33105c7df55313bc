"""Parallelism that is not served is refused with field, value and remedy, before anything is loaded or trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate import ParallelismConfig
from peft import LoraConfig
from transformers import Trainer
from transformers.distributed import DistributedConfig

import trl_fast
from support.models import tiny_model
from support.training import color_pairs
from trl_fast.trainers.base.parallelism import check_loaded_for, check_model_parallelism

CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def test_ring_context_parallelism_is_refused(tmp_path):
    args = trl_fast.DPOConfig(str(tmp_path), **CPU, parallelism_config=ParallelismConfig(cp_size=2))
    message = "parallelism_config: cp_size=2 cannot be used: .*sequences which are packed into one row.*; use sp_size"
    with pytest.raises(ValueError, match=message):
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


def test_tensor_parallelism_beside_data_parallelism_is_refused(tmp_path):
    args = trl_fast.SFTConfig(str(tmp_path), **CPU, parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(
        ValueError, match="parallelism_config: tp_size=2 with 1 processes: .*use tp_size=1, or start 2"
    ):
        trl_fast.SFTTrainer("no such model", args=args, train_dataset=color_pairs(4))


def test_a_whole_model_is_refused_where_it_is_to_be_in_parts():
    args = SimpleNamespace(parallelism_config=ParallelismConfig(tp_size=2))
    message = "parallelism_config: tp_size=2, but LlamaForCausalLM was loaded with tp_size=1; give the model by name"
    with pytest.raises(ValueError, match=message):
        check_loaded_for(args, tiny_model())


@pytest.mark.parametrize("field", ["pp_size", "ep_size", "fsdp_size"])
def test_a_model_that_was_sharded_so_is_refused(tmp_path, tokenizer, field):
    model = tiny_model(vocab_size=len(tokenizer))
    sizes = {"fsdp_size": 2} if field == "ep_size" else {}
    model.config.distributed_config = DistributedConfig(**{**sizes, field: 2})
    args = trl_fast.DPOConfig(str(tmp_path), **CPU)
    with pytest.raises(ValueError, match=f"distributed_config: {field}=2 cannot be used: .*; "):
        trl_fast.DPOTrainer(model, args=args, train_dataset=color_pairs(4), processing_class=tokenizer)


def test_what_tensor_parallelism_does_not_serve_is_refused(tokenizer, tmp_path):
    model = tiny_model(vocab_size=len(tokenizer))
    model.config.distributed_config = DistributedConfig(tp_size=2)
    check_model_parallelism(model, SimpleNamespace(precompute_ref_log_probs=False))
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True with distributed_config: tp_size=2: .*; set"):
        check_model_parallelism(model, SimpleNamespace(precompute_ref_log_probs=True))
    arguments = {"model": model, "train_dataset": color_pairs(4), "processing_class": tokenizer}
    with pytest.raises(ValueError, match="peft_config with distributed_config: tp_size=2: .*; leave one of the"):
        trl_fast.DPOTrainer(
            args=trl_fast.DPOConfig(str(tmp_path), **CPU),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
            **arguments,
        )


def test_processes_without_a_key_value_head_of_their_own_are_refused():
    model = tiny_model()
    model.config.distributed_config = DistributedConfig(tp_size=4)
    with pytest.raises(ValueError, match="tp_size=4: LlamaForCausalLM has 2 key-value heads, .*; use a tp_size that"):
        check_model_parallelism(model, SimpleNamespace())


def test_trainers_that_sample_refuse_tensor_parallelism(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "get_tp_size", lambda self: 2)
    data = color_pairs(8).select_columns("prompt")
    args = trl_fast.GRPOConfig(str(tmp_path), **CPU, num_generations=2, max_completion_length=8)
    with pytest.raises(ValueError, match="tp_size=2: GRPOTrainer deals prompts and rewards to processes"):
        trl_fast.GRPOTrainer(
            tiny_model(vocab_size=len(tokenizer)),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
        )
