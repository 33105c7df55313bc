"""Mixtures of experts in rows: routers, fused experts, their adapters and the routers' loss, as in padded rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models import auto

from support.layout_gradients import assert_same, loss_and_gradients
from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import Tree, pack_trees
from trl_fast.modeling.layouts import supports_packed
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention

# Under each of the names that a family may have for them.
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 16},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 16},
    **{"shared_intermediate_size": 16, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    **{"first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "sliding_window": 64},
    **{"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
}
LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "kv_lora_rank": 8, "q_lora_rank": 8}
LATENT |= {"num_key_value_heads": 4, "head_dim": 4}
FULL = {"layer_types": ["full_attention"] * 2}
# Among them softmax and sigmoid routers, biases that balance, groups, shared experts, latent attention.
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "flex_olmo": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "phimoe": {},
    "minimax": FULL,
    "minimax_m2": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "glm4_moe_lite": LATENT,
    "dots1": {},
    "lfm2_moe": FULL,
    "llama4_text": {"intermediate_size_mlp": 64, "moe_layers": [0, 1], **FULL},
    "afmoe": FULL,
    "cohere2_moe": {},
    "exaone_moe": FULL,
    "laguna": FULL,
    "mellum": FULL,
    "solar_open": {},
    "axk1": LATENT,
    "aria_text": {"moe_num_shared_experts": 1},
    "hy_v3": {},
    "jetmoe": {"kv_channels": 8},
}
BY_DEFAULT = ("qwen3_moe", "ernie4_5_moe", "deepseek_v3", "jetmoe")
IN_TURN = [pytest.param(name, marks=() if name in BY_DEFAULT else pytest.mark.slow) for name in FAMILIES]
WITH_LOGITS = [each for each in IN_TURN if hasattr(auto.CONFIG_MAPPING[each.values[0]], "output_router_logits")]


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Pairs, three branches, one branch, and a prompt that is too short to be shared."""
    return random_trees([(18, (3, 5)), (21, (6, 1, 4)), (17, (4,)), (3, (4, 7))])


def build(name):
    model = tiny_model(name, **EXPERTS | FAMILIES[name])
    attach_scoring(model)
    disable_dropout(model)
    return model


def with_router(model, trees, layout):
    """Loss and gradients of what a token meets; weights of experts that no token was sent to have none."""
    loss, gradients = loss_and_gradients(model, trees, layout)
    return loss, {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("name", IN_TURN)
def test_loss_and_every_gradient(name, trees):
    model = build(name)
    expected = with_router(model, trees, "padded")
    assert len(expected[1]) > 15
    assert supports_packed(model, 64)[0]
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(with_router(model, trees, layout), expected)
    for way in ("eager", "batched_mm", "grouped_mm"):
        if model._can_set_experts_implementation():
            model.set_experts_implementation(way)
            assert_same(with_router(model, trees, "shared_prefix"), expected)


@pytest.mark.parametrize("name", WITH_LOGITS)
def test_the_routers_loss(name, trees):
    """That of padded rows, which the family's own forward gives where it gives one, and its gradients."""
    model = build(name)

    def found(layout):
        model.zero_grad()
        loss = score(model, pack_trees(trees, layout, 2), output_router_logits=True).aux_loss
        loss.backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
        return loss.detach(), {key: gradient for key, gradient in gradients.items() if gradient.any()}

    expected = found("padded")
    assert expected[0] > 0 and expected[1]
    batch = pack_trees(trees, "padded", 2)
    own = model(batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True, use_cache=False)
    if getattr(own, "aux_loss", None) is not None:
        torch.testing.assert_close(own.aux_loss.detach(), expected[0])
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(found(layout), expected)


ADAPTERS = {
    "every linear layer": {"target_modules": "all-linear"},
    "fused experts": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
    "routers": {"target_modules": ["q_proj", "gate"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize(
    "name", ["qwen3_moe", *(pytest.param(each, marks=pytest.mark.slow) for each in ("mixtral", "ernie4_5_moe"))]
)
def test_adapters(name, adapter, trees):
    config = LoraConfig(**adapter, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(name), config)
    expected = loss_and_gradients(model, trees, "padded")
    assert any(".experts." in key for key in expected[1]) == (adapter is not ADAPTERS["routers"])
    use_segment_attention(base_model(model))
    assert_same(loss_and_gradients(model, trees, "packed"), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)


def test_a_router_with_a_loss_of_its_own(trees):
    """Doge's finds an expert by two keys. Its attention has a mask of its own, so it runs padded."""
    model = tiny_model("doge", is_moe=True, num_experts=16, num_experts_per_tok=2, keep_window_size=64)
    attach_scoring(model)
    batch = pack_trees(trees, "padded", 2)
    found = score(model, batch, output_router_logits=True).aux_loss
    own = model(batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True, use_cache=False)
    torch.testing.assert_close(found, own.aux_loss)


def test_a_family_without_logits_of_its_routers(trees, monkeypatch, caplog):
    """As Granite-MoE in transformers 5.17, which takes their loss for 0."""
    model = build("granitemoe")
    monkeypatch.delitem(type(model.model)._can_record_outputs, "router_logits")
    scores = score(model, pack_trees(trees, "padded", 2), output_router_logits=True)
    assert scores.aux_loss == 0 and "no logits of GraniteMoeForCausalLM's routers" in caplog.text
