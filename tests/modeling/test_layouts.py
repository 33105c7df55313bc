"""The layout chosen for a model: the best that model and method declare and that gives the model's own numbers."""

from __future__ import annotations

import logging

import pytest
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from support.models import tiny_classifier, tiny_model
from trl_fast.data.packing import pack_trees
from trl_fast.data.token_trees import Tree
from trl_fast.modeling.classifier_head import attach_classifier_head
from trl_fast.modeling.layouts import (
    REWARDS,
    LayoutRequest,
    Readout,
    choose_layout,
    choose_layout_or_pad,
    declared_layout,
    refusal,
    supports_packed,
)
from trl_fast.modeling.scoring import attach_scoring
from trl_fast.modeling.segment_attention import SEGMENT_ATTENTION
from trl_fast.modeling.verification import Verdict
from trl_fast.settings import batch_layouts
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, LAYOUT_CHOICES, BatchLayout, layouts_for

SEQUENCES = [[5, 6, 7, 8], [9, 10, 11]]
DROPOUT = {"attention_dropout": 0.5}
CHUNKED = {"attention_chunk_size": 64, "num_local_experts": 2, "layer_types": ["chunked_attention", "full_attention"]}


def scored_model(family="llama", **changes):
    model = tiny_model(family, **changes)
    attach_scoring(model)
    return model


def readout(bad=(), fused_error=0.0):
    """A readout whose numbers differ in the layouts of `bad`, and a list of all that it is asked."""
    asked = []

    def verify(model, sequences, *, layout, images=None):
        asked.append((layout, sequences))
        return Verdict(fused_error, 7.0 if layout in bad else 0.0, 1.0)

    return Readout(supports_packed, verify), asked


def test_the_table():
    assert LAYOUT_CHOICES == ("auto", "shared_prefix", "packed", "padded")
    assert layouts_for(shares_prompts=True) == ("shared_prefix", "packed", "padded")
    assert layouts_for(shares_prompts=False) == ("packed", "padded")
    assert [name for name, layout in BATCH_LAYOUTS.items() if layout.pads] == ["padded"]
    assert [layout.padding_multiple(8) for layout in BATCH_LAYOUTS.values()] == [None, None, 8]


@pytest.mark.parametrize("layout", BATCH_LAYOUTS.values(), ids=BATCH_LAYOUTS.keys())
def test_rows_are_as_the_table_says(layout):
    batch = pack_trees([Tree([7] * 20, [[5, 6], [8]])], layout.name, 0)
    assert (batch.attention_mask is not None) == layout.pads == (len(batch.input_ids) > 1)
    assert ((batch.input_ids == 7).sum() == 20) == layout.shares_prompts


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (LayoutRequest("auto"), "shared_prefix"),
        (LayoutRequest("packed"), "packed"),
        (LayoutRequest("padded"), "padded"),
        (LayoutRequest("auto", "sft", shares_prompts=False), "packed"),
    ],
)
def test_the_best_that_serves(request_, expected, caplog):
    model = scored_model()
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, "trl_fast"):
        assert declared_layout(model, request_) == expected
        assert model.config._attn_implementation == before
        assert choose_layout(model, request_, SEQUENCES).name == expected
    assert caplog.records == []
    assert model.config._attn_implementation == (before if expected == "padded" else SEGMENT_ATTENTION)


def test_numbers_count_for_more_than_declarations(caplog):
    model = scored_model()
    with caplog.at_level(logging.WARNING, "trl_fast"):
        checked, asked = readout(bad={"shared_prefix"})
        assert choose_layout(model, LayoutRequest("auto"), SEQUENCES, checked).name == "packed"
        assert [layout for layout, _ in asked] == ["shared_prefix", "packed"]
        checked, asked = readout(bad={"shared_prefix", "packed"})
        assert choose_layout(model, LayoutRequest("auto"), SEQUENCES, checked).name == "padded"
        assert [layout for layout, _ in asked] == ["shared_prefix", "packed"]
    why = "because its shared_prefix scores differ from the single ones by 7"
    assert [r.message for r in caplog.records] == [
        f"batch_layout: using 'packed', {why}.",
        f"batch_layout: using 'padded', {why}.",
    ]


def test_a_failed_trial_leaves_the_attention_as_it_was():
    model = scored_model()
    choose_layout(model, LayoutRequest("auto"), SEQUENCES, readout(bad={"shared_prefix", "packed"})[0])
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("flash", ["flash_attention_2", "flash_attention_3", "kernels-community/vllm-flash-attn3"])
def test_flash_attention_gives_way_to_ours(flash, caplog):
    model = scored_model()
    model.config._attn_implementation = flash
    assert declared_layout(model, LayoutRequest("auto")) == "shared_prefix"
    with caplog.at_level(logging.WARNING, "trl_fast"):
        assert choose_layout(model, LayoutRequest("auto"), SEQUENCES).name == "shared_prefix"
    assert [record.message for record in caplog.records] == [
        f"attn_implementation={flash!r} gives way to trl_fast's own attention, by torch's flash kernels, which keeps "
        "the sequences of a row apart."
    ]


def test_only_what_was_asked_for_is_tried_out():
    checked, asked = readout()
    assert choose_layout(scored_model(), LayoutRequest("packed"), SEQUENCES, checked).name == "packed"
    assert [layout for layout, _ in asked] == ["packed"]
    checked, asked = readout()
    assert choose_layout(scored_model(), LayoutRequest("padded"), [[1] * 50, [2]], checked).name == "padded"
    # Beginnings of sequences with something to predict.
    assert asked == [(None, [[1] * 12])]


@pytest.mark.parametrize(
    ("asked", "family", "config", "changes", "reason"),
    [
        ("shared_prefix", "llama", {}, {"shares_prompts": False}, "sft has no prompts that several completions share"),
        ("shared_prefix", "llama", DROPOUT, {"without_dropout": False}, "an attention dropout of 0.5"),
        ("packed", "mistral", {"sliding_window": 6, **DROPOUT}, {"without_dropout": False}, "dropout of 0.5"),
        ("packed", "llama4_text", CHUNKED, {"max_length": 1024}, "chunks of 64 tokens"),
    ],
)
def test_what_cannot_be_is_an_error_with_its_reason(asked, family, config, changes, reason):
    model = scored_model(family, **config)
    request = LayoutRequest(asked, "sft", **changes)
    message = f"batch_layout='{asked}' cannot be used: .*{reason}.*; use 'auto' or 'padded'"
    with pytest.raises(ValueError, match=message):
        declared_layout(model, request)
    with pytest.raises(ValueError, match=message):
        choose_layout(model, request, SEQUENCES)


def test_dropout_of_plain_attention_leaves_packed_rows():
    request = LayoutRequest("auto", without_dropout=False)
    assert choose_layout(scored_model("llama", **DROPOUT), request, SEQUENCES).name == "packed"
    windowed = scored_model("mistral", sliding_window=6, **DROPOUT)
    assert choose_layout(windowed, request, SEQUENCES).name == "padded"


def test_a_fused_head_that_disagrees_is_given_up(caplog):
    model = scored_model()
    with caplog.at_level(logging.WARNING, "trl_fast"):
        choose_layout(model, LayoutRequest("auto"), SEQUENCES, readout(fused_error=3.0)[0])
    assert not model.trl_fast_fused_head
    assert "LlamaForCausalLM: the fused head's log-probs differ from the model's own by up to 3 nats" in caplog.text


def test_a_head_behind_a_projection_is_given_up(caplog):
    model = scored_model("electra", embedding_size=16, is_decoder=True)
    with caplog.at_level(logging.WARNING, "trl_fast"):
        assert choose_layout(model, LayoutRequest("auto"), SEQUENCES).name == "shared_prefix"
    assert not model.trl_fast_fused_head
    assert "ElectraForCausalLM: its head does not read what its layers give, but a projection of it" in caplog.text


def test_a_classifier_beside_the_policy_is_padded_where_nothing_else_serves(caplog, monkeypatch):
    def leaky(module, query, key, value, mask, tree_lengths=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    model = tiny_classifier("llama").eval()
    attach_classifier_head(model)
    request = LayoutRequest("shared_prefix")
    assert choose_layout_or_pad(model, request, SEQUENCES) == "shared_prefix"
    monkeypatch.setitem(AttentionInterface._global_mapping, SEGMENT_ATTENTION, leaky)
    with caplog.at_level(logging.WARNING, "trl_fast"):
        assert choose_layout_or_pad(model, LayoutRequest("padded"), SEQUENCES) == "padded"
        assert caplog.records == []
        assert choose_layout_or_pad(model, request, SEQUENCES) == "padded"
    assert "LlamaForSequenceClassification is run on padded rows" in caplog.text


def test_rewards_need_a_head_that_reads_one_token():
    request = LayoutRequest("auto", "reward")
    packed, padded = BATCH_LAYOUTS["packed"], BATCH_LAYOUTS["padded"]
    assert "has no head 'score'" in refusal(packed, tiny_classifier("bert"), request, REWARDS)
    assert refusal(padded, tiny_classifier("bert"), request, REWARDS) is None
    assert refusal(packed, tiny_classifier("llama"), request, REWARDS) is None


def test_a_new_layout_is_one_row_of_the_table(monkeypatch):
    monkeypatch.setattr(batch_layouts, "BATCH_LAYOUTS", {"new": BatchLayout("new"), **BATCH_LAYOUTS})
    assert layouts_for(shares_prompts=False) == ("new", "packed", "padded")


@pytest.mark.parametrize(
    "family, changes, max_length, reason",
    [
        ("llama", {}, 1024, None),
        ("mistral", {"sliding_window": 64}, 1024, None),
        ("llama4_text", CHUNKED, 64, None),
        ("llama4_text", CHUNKED, 65, "chunks of 64 tokens"),
        ("llama4_text", CHUNKED, None, "chunks of 64 tokens"),
        ("llama4_text", {**CHUNKED, "no_rope_layers": [1, 0]}, 64, "queries are scaled by their place in the row"),
        ("deepseek_v32", {"num_key_value_heads": 4}, 64, "another kind than is known: indexed_attention"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 1024, None),
        ("gemma2", {"sliding_window": 2048}, 1024, None),
        ("bloom", {}, 1024, "AttentionInterface"),
        ("mamba", {}, 1024, "carries a state"),
        ("gpt2", {}, 1024, None),
    ],
)
def test_which_models_run_packed(family, changes, max_length, reason):
    ok, why = supports_packed(tiny_model(family, **changes), max_length)
    assert ok == (reason is None), why
    if reason:
        assert reason in why


def test_a_chosen_attention_is_respected():
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    ok, why = supports_packed(model, 1024)
    assert not ok and "flex_attention" in why
