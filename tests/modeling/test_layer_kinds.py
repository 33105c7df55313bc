"""Kinds of layers, read from config and modules of a model, on the meta device too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.models import tiny_config
from trl_fast.modeling.layer_kinds import (
    ATTENTION,
    DELTA_ATTENTION,
    GATED_DELTA_NET,
    LIGHTNING_ATTENTION,
    MAMBA_1,
    MAMBA_2,
    RECURRENT_MIXERS,
    SHORT_CONVOLUTION,
    UNKNOWN,
    layer_kinds,
    mixers_of,
    shortened_windows,
)
from trl_fast.modeling.recurrent_layers import RECURRENT_LAYERS


def meta_model(family, **changes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes))


# What each layer is: mixer, window, sinks.
MODELS = {
    "llama": ({}, [(ATTENTION, None, False)] * 2),
    "gpt2": ({}, [(ATTENTION, None, False)] * 2),
    "mistral": ({"sliding_window": 64}, [(ATTENTION, 64, False)] * 2),
    "qwen2": (
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
        [(ATTENTION, None, False), (ATTENTION, 64, False)],
    ),
    "gemma2": ({"sliding_window": 32}, [(ATTENTION, 32, False), (ATTENTION, None, False)]),
    "gpt_oss": ({"sliding_window": 8}, [(ATTENTION, 8, True), (ATTENTION, None, True)]),
    "mimo_v2_flash": ({"sliding_window": 8}, [(ATTENTION, None, False), (ATTENTION, 8, True)]),
    "exaone4": (
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        [(ATTENTION, 8, False), (ATTENTION, None, False)],
    ),
    "olmo_hybrid": ({}, [(GATED_DELTA_NET, None, False), (ATTENTION, None, False)]),
    "kimi_linear": ({}, [(DELTA_ATTENTION, None, False)] * 2),
    "lfm3": ({}, [(SHORT_CONVOLUTION, None, False)] * 2),
    "minimax": ({}, [(ATTENTION, None, False), (LIGHTNING_ATTENTION, None, False)]),
    "falcon_h1": ({}, [(MAMBA_2, None, False), (ATTENTION, None, False)] * 2),
    "mamba": ({}, [(MAMBA_1, None, False)] * 2),
    # Layers of experts and of an MLP mix nothing.
    "nemotron_h": ({}, [(MAMBA_2, None, False), (ATTENTION, None, False)]),
    "deepseek_v32": ({}, [(UNKNOWN, None, False)] * 2),
    "zaya": ({}, [(UNKNOWN, None, False)] * 2),
    "bart": ({}, [(UNKNOWN, None, False)]),
}


@pytest.mark.parametrize("family", MODELS)
def test_what_the_layers_are(family):
    changes, expected = MODELS[family]
    found = layer_kinds(meta_model(family, **changes))
    assert [(kind.mixer, kind.window, kind.sinks) for kind in found] == expected
    assert all(kind.is_recurrent == (kind.mixer not in (ATTENTION, UNKNOWN)) for kind in found)


def test_sizes_of_heads_caps_chunks_and_convolutions():
    (deep, _) = layer_kinds(meta_model("deepseek_v3", qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6))
    assert (deep.heads, deep.key_width, deep.value_width) == (4, 12, 6)
    (sliding, full) = layer_kinds(meta_model("gemma4_text", global_head_dim=16))
    assert (sliding.key_width, full.key_width) == (8, 16)
    (capped, _) = layer_kinds(meta_model("gemma2", attn_logit_softcapping=0.5))
    assert (capped.softcap, capped.heads, capped.key_heads) == (0.5, 4, 2)
    assert layer_kinds(meta_model("llama4_text", attention_chunk_size=32))[0].chunk == 32
    assert layer_kinds(meta_model("lfm3"))[0].convolution == 7


def test_an_unknown_mixer_is_named():
    model = meta_model("llama")
    model.model.layers[1].self_attn = torch.nn.Conv1d(32, 32, 3)
    known, unknown = layer_kinds(model)
    assert (known.mixer, unknown.mixer, unknown.name, unknown.layer) == (ATTENTION, UNKNOWN, "Conv1d", 1)
    model.model.layers[1].self_attn = torch.nn.Linear(2, 2)
    assert layer_kinds(model)[1].name == "LlamaDecoderLayer"


def test_queries_that_are_scaled_by_their_place_in_the_row_are_not_known():
    positions = {"no_rope_layers": [1, 0], "attention_chunk_size": 32}
    rotary, scaled = layer_kinds(meta_model("llama4_text", **positions))
    assert (rotary.mixer, scaled.mixer) == (ATTENTION, UNKNOWN) and "attn_temperature_tuning" in scaled.name
    kinds = layer_kinds(meta_model("llama4_text", attn_temperature_tuning=False, **positions))
    assert [kind.mixer for kind in kinds] == [ATTENTION, ATTENTION]


def test_windows_are_shortened_within_the_context_alone():
    model = meta_model("gemma2", sliding_window=32)
    sliding, full = mixers_of(model)
    with shortened_windows(model, 6):
        assert (model.config.sliding_window, sliding.sliding_window, full.sliding_window) == (6, 6, None)
        with shortened_windows(model, 8):
            assert model.config.sliding_window == 6
    assert (model.config.sliding_window, sliding.sliding_window, full.sliding_window) == (32, 32, None)


def test_layers_that_run_in_rows_are_known_by_their_kind():
    assert all(name.endswith(tuple(RECURRENT_MIXERS)) for name in RECURRENT_LAYERS)
