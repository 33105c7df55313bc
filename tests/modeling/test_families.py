"""Families of models: rows with prompts shared or not give the loss and every gradient of the padded layout."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.memory import measure_peak
from support.families import FAMILIES, LIKE_OTHERS
from support.layout_gradients import assert_same, loss_and_gradients
from support.models import tiny_model
from support.trees import random_trees
from trl_fast.data import Tree, pack_trees
from trl_fast.modeling.attention import plain
from trl_fast.modeling.layouts import LayoutRequest, choose_layout
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention


def build(name, **changes):
    model = tiny_model(name.split(",")[0], **{**FAMILIES[name], **changes})
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # States live for some tokens.
            if parameter_name.endswith("A_log"):
                parameter.uniform_(-3, -1)
    attach_scoring(model)
    disable_dropout(model)
    return model


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    """Pairs, three branches, one branch, and a prompt that is too short to be shared; some cross a window's edge."""
    return random_trees([(18, (3, 9)), (21, (6, 1, 4)), (17, (4,)), (3, (4, 7))])


def slow_unless(is_quick, names):
    return [name if is_quick(name) else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_unless(lambda name: name not in LIKE_OTHERS, FAMILIES))
def test_loss_and_every_gradient(name, trees):
    model, padded = build(name), build(name)
    probes = [trees[0].prompt_ids]
    assert choose_layout(padded, LayoutRequest("padded"), probes).name == "padded"
    expected = loss_and_gradients(padded, trees, "padded")
    assert choose_layout(model, LayoutRequest("auto", max_length=1024), probes) == ("shared_prefix", None)
    assert_same(loss_and_gradients(model, trees, "packed"), expected)
    assert_same(loss_and_gradients(model, trees, "shared_prefix"), expected)


EDGES = {
    "no prompt": [(0, (5, 3)), (20, (4, 2))],
    "empty branches": [(20, (0, 4)), (18, (3, 0)), (20, (0, 0))],
    "one branch": [(20, (4,)), (0, (3,))],
    # More than the model has positions: each sequence begins with the first one.
    "twenty branches": [(20, (2, 1) * 10)],
    "prompts as long as a window, and around it": [(16, (5, 1)), (17, (4, 2)), (1, (1, 1)), (2, (3, 1))],
}
AT_THE_EDGES = ["llama", "gpt2", "gpt_oss", "gemma4_text", "qwen3_5_text", "lfm3", "falcon_h1"]


@pytest.mark.parametrize("name", slow_unless(("llama", "gpt_oss", "qwen3_5_text").__contains__, AT_THE_EDGES))
@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES)
def test_trees_at_the_edges(lengths, name):
    window = {"sliding_window": 16} if "sliding_window" in FAMILIES[name] else {}
    model = build(name, max_position_embeddings=30, **window)
    expected = loss_and_gradients(model, random_trees(lengths), "padded")
    use_segment_attention(model)
    assert_same(loss_and_gradients(model, random_trees(lengths), "packed"), expected)
    assert_same(loss_and_gradients(model, random_trees(lengths), "shared_prefix"), expected)


# Each family in both layouts and with both kinds of checkpointing, and those with one another.
CHECKPOINTED = [
    (name, reentrant, ("packed", "shared_prefix")[(place + reentrant) % 2])
    for place, name in enumerate(["llama", "gemma2", "gpt2", "phi3", "mixtral", "qwen3_moe"])
    for reentrant in (False, True)
]


@pytest.mark.parametrize("name, reentrant, layout", CHECKPOINTED)
def test_gradient_checkpointing(name, reentrant, layout, trees):
    model = build(name)
    # transformers collects router logits where reentrant checkpointing records no gradients.
    expected = loss_and_gradients(model, trees, "padded", router=not reentrant)
    use_segment_attention(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(loss_and_gradients(model, trees, layout, router=not reentrant), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["keep", "reentrant"])
@pytest.mark.parametrize("name, target", [("llama", "all-linear"), ("gemma2", "all-linear"), ("mixtral", ["q_proj"])])
def test_lora(name, target, checkpointing, trees):
    config = LoraConfig(target_modules=target, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(build(name), config)
    expected = loss_and_gradients(model, trees, "padded", router=not checkpointing)
    use_segment_attention(base_model(model))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout, router=not checkpointing), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routers_loss_beside_the_models_own_logits(name, trees):
    """The slow path, for heads that are not understood."""
    model = build(name)
    expected = loss_and_gradients(model, trees, "padded")
    model.trl_fast_fused_head = False
    assert_same(loss_and_gradients(model, trees, "padded"), expected)
    use_segment_attention(model)
    for layout in ("packed", "shared_prefix"):
        assert_same(loss_and_gradients(model, trees, layout), expected)


def test_capped_scores_under_autocast(trees):
    model = build("gemma2")
    use_segment_attention(model)
    batch = pack_trees(trees, "shared_prefix", 2)
    exact = score(model, batch).tokens.logprobs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(model, batch).tokens.logprobs
        rounded.sum().backward()
    assert 1e-5 < (rounded - exact).abs().max() < 0.3


def test_a_model_that_sdpa_does_not_serve_keeps_its_own_attention_without_lengths():
    """Generation and plain forwards of a model that caps its scores."""
    plain, ours = (build("gemma2").eval() for _ in range(2))
    use_segment_attention(ours)
    ids = torch.tensor([[5, 6, 7, 8], [2, 2, 9, 10]])
    given = {"input_ids": ids, "attention_mask": (ids != 2).long()}
    assert torch.equal(ours(**given).logits, plain(**given).logits)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(ours.generate(**given, **options), plain.generate(**given, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_a_long_row_builds_nothing_of_tokens_squared(name, monkeypatch):
    """Forward and backward of a whole model, a prompt shared by two branches."""
    monkeypatch.setattr(plain, "_TILE_BYTES", 1 << 22)
    model = build(name, num_attention_heads=1, num_key_value_heads=1)
    use_segment_attention(model)
    model.gradient_checkpointing_enable()
    batch = pack_trees(random_trees([(5900, (50, 50))]), "shared_prefix", 2)

    def step():
        score(model, batch).tokens.logprobs.sum().backward()

    # A mask of one byte an entry, for one head.
    assert measure_peak(step).peak_bytes < 6000 * 6000
