"""The weights that another engine loads: those of the merged checkpoint, and the policy untouched."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from support.families import OF_EXPERTS, WITH_STATES
from support.models import tiny_model
from trl_fast.rollout.weights import merged_weights, weight_metadata


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_plain_model(family):
    model = tiny_model(family)
    assert_same(dict(merged_weights(model)), dict(model.named_parameters()))
    assert ("lm_head.weight" in dict(merged_weights(model))) == (family == "llama")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapter_is_merged_and_the_model_untouched(settings):
    torch.manual_seed(1)
    model = tiny_model("qwen2", tie_word_embeddings=False).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before = copy.deepcopy(model.state_dict())
    # Collected before they are looked at, as what sends them does.
    got = dict(list(merged_weights(model)))
    assert_same(model.state_dict(), before)
    assert weight_metadata(model) == [(name, "bfloat16", list(value.shape)) for name, value in got.items()]
    expected = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert_same(got, expected)


def test_other_adapters_stay_out():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    names = [name for name, _ in merged_weights(model)]
    model.add_adapter("ref", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert [name for name, _ in merged_weights(model)] == names


SLOW = pytest.mark.slow
# Fused experts, in two namings, and modules that have other names on disk.
PUBLISHED_OTHERWISE = {name: (OF_EXPERTS | WITH_STATES)[name] for name in ("mixtral", "qwen3_moe", "nemotron_h")}


@pytest.mark.parametrize(
    "family", ["mixtral", *(pytest.param(each, marks=SLOW) for each in ("qwen3_moe", "nemotron_h"))]
)
@pytest.mark.parametrize("source", ["made", "loaded", "adapter"])
def test_names_are_those_of_published_checkpoints(family, source, tmp_path):
    model = tiny_model(family, **PUBLISHED_OTHERWISE[family])
    model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")
    assert set(published) != set(model.state_dict())
    if source == "loaded":
        model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    if source == "adapter":
        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
        merged = copy.deepcopy(model).merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        published = load_file(tmp_path / "merged" / "model.safetensors")
    got = dict(merged_weights(model))
    assert set(got) == set(published)
    for name, value in published.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)
        assert got[name].is_contiguous()
    assert weight_metadata(model) == [(name, "float32", list(value.shape)) for name, value in got.items()]
