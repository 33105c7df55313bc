"""Models whose windows are shorter than their rows, by how the window reaches their attention; and with sinks."""

from __future__ import annotations

import pytest

from benchmarks.memory import measure_peak
from support.layout_gradients import assert_same, loss_and_gradients
from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import packing
from trl_fast.modeling.loading import disable_dropout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention

WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    # By keyword: the same for all layers; of some layers; None where the module has one.
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "exaone4": {"layer_types": ["full_attention", "sliding_attention"]},
    # By the mask alone: of the layers that have it as an attribute; of all layers.
    "qwen2_moe": {
        **EXPERTS,
        **{"use_sliding_window": True, "max_window_layers": 2, "shared_expert_intermediate_size": 16},
    },
    "phimoe": {**FEW_EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    # With capped scores; sinks; sinks, values of another width than the keys, and more key heads where it slides.
    "gemma2": {"attn_logit_softcapping": 0.5},
    "gpt_oss": FEW_EXPERTS,
    "mimo_v2_flash": {
        **{"v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        **{"moe_intermediate_size": 16, "layer_types": ["full_attention", "sliding_attention"]},
    },
}


@pytest.fixture(scope="module")
def trees():
    """Prompts longer than the window, of its length, and shorter; branches too, and empty ones."""
    return random_trees([(18, (3, 12)), (9, (6, 1, 0, 9)), (8, (4, 4)), (3, (4, 7))])


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(name, trees, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    model = tiny_model(name, **WINDOW, **MODELS[name])
    attach_scoring(model)
    disable_dropout(model)
    router = name not in ("phimoe", "mimo_v2_flash")
    expected = loss_and_gradients(model, trees, "padded", router=router)
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout, router=router), expected)


def peak_of_a_step(layout, tokens):
    """Bytes at the peak of forward and backward of two windowed layers, on one tree of so many tokens."""
    layers = {"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}
    model = tiny_model("gemma3_text", max_position_embeddings=tokens, **layers)
    attach_scoring(model)
    disable_dropout(model)
    if layout != "padded":
        use_segment_attention(model)
    model.gradient_checkpointing_enable()
    batch = packing.pack_trees(random_trees([(tokens - 64, (32, 32))]), layout, 2)

    def step():
        score(model, batch).tokens.logprobs.sum().backward()

    step()
    return measure_peak(step).peak_bytes


def test_a_step_takes_memory_linear_in_the_rows_length():
    """docs/benchmarks.md has the numbers."""
    assert peak_of_a_step("shared_prefix", 8192) < 4.1 * peak_of_a_step("shared_prefix", 2048)


@pytest.mark.slow
def test_a_step_on_padded_rows_takes_memory_that_grows_faster():
    assert peak_of_a_step("padded", 8192) > 10 * peak_of_a_step("padded", 2048)
