"""Gradients through the states of recurrent layers, with what training puts on a model."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model

import trl_fast
from support.layout_gradients import assert_same, loss_and_gradients
from support.models import tiny_model
from support.ranks import run_on_ranks
from support.tokenizer import build_tokenizer
from support.training import color_pairs, make_trainer
from support.trees import random_trees
from trl_fast.modeling.activation_offloading import offload_activations
from trl_fast.modeling.checkpointing import disable_checkpointing, enable_checkpointing
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing
from trl_fast.modeling.tiled_mlp import tile_mlps

SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
FAMILIES = {
    "olmo_hybrid": {**SIZES, "layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True},
    "falcon_h1": {
        **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
        **{"mamba_chunk_size": 16, "mamba_d_ssm": 64},
    },
    # Its decoder layers keep the lengths to themselves, and its states are no starting points.
    "jamba": {
        **{"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"num_experts": 1, "num_experts_per_tok": 1},
    },
}


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def trees():
    return random_trees([(18, (3, 5)), (41, (6, 1, 4)), (17, (14,)), (3, (4, 7)), (20, (1, 30))])


def build(name, **changes):
    """A model whose states live for some tokens: then the gradients of decays are no rounding."""
    model = tiny_model(name, **FAMILIES[name], **changes)
    attach_scoring(model)
    disable_dropout(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("A_log"):
            torch.nn.init.uniform_(parameter, -3, -1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("name", ["olmo_hybrid", "jamba", *slow("lfm2", "falcon_h1")])
def test_checkpointing(name, trees):
    model = build(name)
    expected = loss_and_gradients(model, trees, "padded", router=False)
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout, router=False), expected)
    for limit, reentrant in ((0, True), (0, False), (1 << 30, False)):
        set_selective_checkpointing(model, limit)
        enable_checkpointing(model, {"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same(loss_and_gradients(model, trees, "shared_prefix", router=False), expected)
        disable_checkpointing(model)


@pytest.mark.parametrize("name", ["olmo_hybrid", *slow("lfm2", "falcon_h1", "jamba")])
def test_an_adapter_in_tiles_under_checkpointing(name, trees):
    # PEFT refuses the output projections of Mamba layers.
    target = "all-linear" if name in ("olmo_hybrid", "lfm2") else ["in_proj", "q_proj", "v_proj", "down_proj"]
    config = LoraConfig(target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(name), config)
    expected = loss_and_gradients(model, trees, "padded", router=False)
    inner = base_model(model)
    use_segment_attention(inner)
    assert_same(loss_and_gradients(model, trees, "shared_prefix", router=False), expected)
    tile_mlps(inner, 16)
    set_selective_checkpointing(inner, 1 << 30)
    enable_checkpointing(model)
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, trees, "shared_prefix", router=False), expected)
    offload_activations(inner)
    assert_same(loss_and_gradients(model, trees, "shared_prefix", router=False), expected)


def test_autocast(trees):
    """Half precision gives the gradients of half precision: as far from the exact ones as the padded layout's."""
    model = build("olmo_hybrid")
    exact = loss_and_gradients(model, trees, "padded")[1]

    def errors(layout):
        with torch.autocast("cpu", torch.bfloat16):
            scores = loss_and_gradients(model, trees, layout)[1]
        return torch.stack([(scores[name] - exact[name]).norm() / exact[name].norm() for name in exact])

    padded = errors("padded")
    use_segment_attention(model)
    rows = errors("shared_prefix")
    assert (rows < 2 * padded + 1e-3).all() and padded.max() > 1e-3


def train(folder, **settings):
    tokenizer = build_tokenizer()
    model = build("olmo_hybrid", vocab_size=len(tokenizer))
    arguments = {"model": model, "processing_class": tokenizer, "train_dataset": color_pairs(12)}
    arguments["eval_dataset"] = None
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, **settings}
    trainer = make_trainer(trl_fast, folder, method="DPO", arguments=arguments, **settings)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    return trainer.layout.name, [(log["loss"], log["grad_norm"]) for log in logs]


def test_the_reference_policy_keeps_its_states_apart(tmp_path):
    padded, rows = (train(tmp_path / layout, batch_layout=layout)[1] for layout in ("padded", "shared_prefix"))
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(padded), rtol=1e-5, atol=1e-6)
    assert padded[0][0] == pytest.approx(math.log(2))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(engine, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    both = run_on_ranks(partial(train, tmp_path / "two", **settings), engine=engine)
    expected = train(tmp_path / "one", batch_layout="padded", **{**settings, "per_device_train_batch_size": 4})
    for layout, steps in both:
        assert layout == "shared_prefix"
        torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected[1]), rtol=1e-5, atol=1e-6)
