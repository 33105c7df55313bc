"""Gemma 3n and Gemma 4, whose later layers read keys and values of earlier ones, in rows, checkpointed, adapted."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model

from support.layout_gradients import assert_same, loss_and_gradients
from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import Tree
from trl_fast.data.balanced_batches import CostModel
from trl_fast.data.layer_sizes import experts_per_token, head_width, key_value_heads, mlp_width, num_experts
from trl_fast.modeling.activation_offloading import offload_activations
from trl_fast.modeling.checkpointing import disable_checkpointing, enable_checkpointing
from trl_fast.modeling.layouts import LayoutRequest, choose_layout, supports_packed
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.selective_checkpointing import set_selective_checkpointing
from trl_fast.modeling.tiled_mlp import tile_mlps

# Their scores are not divided by the square root of the heads' width: large weights would be all rounding.
COMMON = {"sliding_window": 7, "initializer_range": 0.1}
PER_LAYER = {"vocab_size_per_layer_input": 340, "hidden_size_per_layer_input": 8}
TURNS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "gemma3n": {
        **{**COMMON, **PER_LAYER, "num_hidden_layers": 5, "layer_types": [*TURNS, *TURNS, TURNS[0]]},
        **{"num_kv_shared_layers": 2, "intermediate_size": [64] * 5, "laurel_rank": 4, "altup_num_inputs": 3},
        **{"activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.0]},
    },
    "gemma4": {
        **{**COMMON, **PER_LAYER, "num_hidden_layers": 6, "layer_types": TURNS * 3, "global_head_dim": 16},
        **{"num_kv_shared_layers": 3, "num_global_key_value_heads": 1, "use_double_wide_mlp": True},
    },
    # Heads that no flash kernel of a GPU takes, values that are the keys, experts beside the MLP.
    "gemma4, wide heads": {
        **{**COMMON, "layer_types": TURNS, "global_head_dim": 512, "hidden_size_per_layer_input": 0},
        **{"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True},
        **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16, "num_kv_shared_layers": 0},
    },
}
SHARING = ["gemma3n", "gemma4"]


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Pairs, three branches, one branch, and a prompt that is too short to be shared."""
    return random_trees([(18, (3, 5)), (21, (6, 1, 4)), (17, (4,)), (3, (4, 7))])


def build(name):
    model = tiny_model(f"{name.split(',')[0]}_text", **FAMILIES[name])
    attach_scoring(model)
    disable_dropout(model)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient(name, trees):
    model = build(name)
    expected = loss_and_gradients(model, trees, "padded")
    assert supports_packed(model, 64)[0]
    assert choose_layout(model, LayoutRequest("auto", max_length=64), [[5, 6, 7, 8]]).name == "shared_prefix"
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout), expected)


def test_sizes_of_layers_that_differ():
    """By which rows are dealt to processes and memory is budgeted."""
    mixture, sparse = (build(name).config for name in ("gemma4, wide heads", "gemma3n"))
    assert (head_width(mixture), key_value_heads(mixture), mlp_width(mixture)) == (512, 2, 64)
    assert (num_experts(mixture), experts_per_token(mixture)) == (4, 2)
    assert (head_width(sparse), mlp_width(sparse), num_experts(sparse)) == (8, 64, None)
    assert CostModel.of_config(mixture, has_head=True).pair == 4 * 2 * 4 * 512


@pytest.mark.parametrize("name", SHARING)
def test_checkpointing(name, trees, caplog):
    """Whether results are kept or not. Reentrant, transformers would lose what later layers ask of shared keys."""
    model = build(name)
    expected = loss_and_gradients(model, trees, "padded")
    use_segment_attention(model)
    for limit in (0, 1 << 30):
        set_selective_checkpointing(model, limit)
        for reentrant in (False, True):
            enable_checkpointing(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
            for layout in ("padded", "shared_prefix"):
                assert_same(loss_and_gradients(model, trees, layout), expected)
            disable_checkpointing(model)
    assert "use_reentrant=True becomes False" in caplog.text


@pytest.mark.parametrize("name", SHARING)
def test_an_adapter_in_tiles_under_checkpointing(name, trees):
    # Not on AltUp's coefficients: in training Gemma 3n reads their weights past the adapter.
    target = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "per_layer_input_gate"]
    config = LoraConfig(target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(name), config)
    expected = loss_and_gradients(model, trees, "padded")
    inner = base_model(model)
    use_segment_attention(inner)
    assert_same(loss_and_gradients(model, trees, "packed"), expected)
    tile_mlps(inner, 16)
    set_selective_checkpointing(inner, 1 << 30)
    enable_checkpointing(model)
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)
    offload_activations(inner)
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)
