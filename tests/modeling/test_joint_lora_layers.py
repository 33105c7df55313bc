"""LoRA layers that read one input, beside plain ones or not: calls, bits, gradients, and what runs as before."""

from __future__ import annotations

import copy

import pytest
import torch
from modeling.test_fused_layers import (  # noqa: F401 the fixture puts transformers' functions back
    CPU,
    IDS,
    _own_functions,
    assert_same,
    family_model,
    run,
)
from modeling.test_joint_projections import counted_calls
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from support.low_bit import quantization
from support.models import tiny_model
from support.seen_operators import SeenOperators
from trl_fast.modeling.fused_layers import FUSED_LAYERS, attach, fuse_layers, projections
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.low_bit_layers import compute_alike
from trl_fast.modeling.model_changes import changes_of
from trl_fast.ops.device import DeviceFacts, simulated_device

ALL = [3, 2, 3, 2]


@pytest.fixture
def calls(monkeypatch):
    return counted_calls(monkeypatch)


def with_lora(family="llama", target_modules="all-linear", dtype=torch.float32, **options):
    """A model whose layers' inputs all have a gradient, as under checkpointing."""
    torch.manual_seed(1)
    options = {"r": 4, "init_lora_weights": False, **options}
    model = get_peft_model(family_model(family).to(dtype), LoraConfig(target_modules=target_modules, **options))
    model.enable_input_require_grads()
    return model


def fused(model, calls):
    fuse_layers(base_model(model), CPU)
    calls.clear()
    return model


def both(calls, change=lambda model: None, **options):
    """The results of a model before layers are fused, and after."""
    results = []
    for fuses in (False, True):
        model = with_lora(**options)
        change(model)
        if fuses:
            fused(model, calls)
        torch.manual_seed(0)
        results.append(run(model))
    return results


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "up_proj"]},
        {"rank_pattern": {"k_proj": 2, "up_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True},
        {"bias": "all", "family": "qwen2"},
        {"modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.5, "inference_mode": False, "target_modules": ["down_proj"]},
    ],
    ids=str,
)
def test_gradients_are_those_of_before(options, calls):
    expected, got = both(calls, **options)
    assert_same(got, expected)
    assert calls == ALL


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "starcoder2", "olmo2"])
def test_forward_has_the_same_bits(family, calls, monkeypatch):
    model = fused(with_lora(family), calls)
    got = run(model), model(input_ids=IDS, use_cache=False).logits
    assert 3 in calls
    monkeypatch.setattr(projections, "_joint_parts", lambda *_: None)
    expected = run(model), model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(got[1], expected[1])
    assert_same(got[0], expected[0])


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_no_sum_of_its_own(target_modules, calls, monkeypatch):
    """Of what a layer's queries, keys and values read, and of what its gate and up read: three a layer."""
    model, adds = fused(with_lora(target_modules=target_modules), calls), []
    for _ in range(2):
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        with SeenOperators() as seen:
            loss.backward()
        adds.append(sum(name.startswith("aten::add.") for name in seen.names))
        monkeypatch.setattr(projections, "_joint_parts", lambda *_: None)
    assert adds[1] - adds[0] == 3 * 2 and calls == ALL


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, calls):
    expected = run(with_lora("qwen2"))
    model = fused(with_lora("qwen2"), calls)
    base_model(model).gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(run(model), expected)
    assert calls == ALL * (1 if use_reentrant else 2)


def second_adapter(model):
    model.add_adapter("other", LoraConfig(target_modules=["up_proj", "q_proj"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def disabled(model):
    for module in lora_layers(model):
        module.enable_adapters(False)


def lora_layers(model, *names):
    found = [module for name, module in model.named_modules() if name.endswith(names or "_proj")]
    return [module for module in found if hasattr(module, "lora_A")]


def drops(model):
    for module in lora_layers(model, "k_proj", "gate_proj"):
        module.lora_dropout["default"] = nn.Dropout(0.5)


def hook_on_the_layer(model):
    for module in lora_layers(model, "v_proj"):
        module.register_forward_hook(lambda _, args, out: 2 * out)


def hook_on_its_base(model):
    for module in lora_layers(model, "up_proj"):
        module.base_layer.register_forward_hook(lambda _, args, out: 2 * out)


def hook_on_its_adapter(model):
    for module in lora_layers(model, "q_proj"):
        module.lora_B["default"].register_forward_hook(lambda _, args, out: 2 * out)


def in_parts(model):
    """As ZeRO-3 marks weights."""
    for module in lora_layers(model, "q_proj"):
        module.lora_A["default"].weight.ds_status = "AVAILABLE"


def of_two_dtypes(model):
    """The adapter's is wider than the layer's: PEFT widens the input, and rounds the result."""
    for module in lora_layers(model, "k_proj"):
        module.base_layer.double()
        module.register_forward_pre_hook(lambda _, args: args[0].double())
        module.register_forward_hook(lambda _, args, out: out.float())


MLP, ATTENTION = [2, 2], [3, 3]


@pytest.mark.parametrize(
    ("change", "joint"),
    [
        (second_adapter, []),
        (drops, []),
        (hook_on_the_layer, MLP),
        (hook_on_its_base, ATTENTION),
        (hook_on_its_adapter, MLP),
        (in_parts, MLP),
        (of_two_dtypes, MLP),
        (disabled, []),
    ],
)
def test_groups_with_a_layer_of_another_kind_run_as_before(change, joint, calls):
    expected, got = both(calls, change)
    assert_same(got, expected)
    assert calls == joint


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
def test_adapters_that_do_more_run_as_before(options, calls):
    assert_same(*reversed(both(calls, **options)))
    assert calls == []


def test_what_changes_from_call_to_call(calls):
    """Adapters that are merged, disabled or without gradients, as those of a reference are, and then as before."""
    model = fused(with_lora(), calls)
    expected = run(model)
    assert calls == ALL
    model.merge_adapter()
    run(model)
    model.unmerge_adapter()
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=IDS, use_cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        # On a CPU products of 16 bits have ways of their own.
        run(model)
    assert calls == ALL
    assert_same(run(model), expected, rtol=1e-4)
    assert calls == ALL * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_a_gpu(dtype, calls):
    """The adapter is in float32, as PEFT makes it; gradients are as near to those of float32 as PEFT's own."""
    model = with_lora(target_modules=["q_proj", "v_proj", "gate_proj"], dtype=dtype)
    assert {weight.dtype for name, weight in model.named_parameters() if "lora_" in name} == {torch.float32}
    exact = copy.deepcopy(model).float()
    right, gpu = run(exact), DeviceFacts("cuda", multiplies_bf16=True, serves=lambda *_: False)
    with simulated_device(gpu), torch.autocast("cpu", torch.bfloat16):
        expected = run(model)
        got = run(fused(model, calls))
    assert calls == ALL
    for name, gradient in right[1].items():
        error, allowed = ((found[1][name].float() - gradient).norm() for found in (got, expected))
        assert error <= 2 * allowed, name


def test_a_compiler_gets_the_layers_themselves(calls, monkeypatch):
    model = fused(with_lora(), calls)
    expected = run(model)
    assert calls == ALL
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(run(model), expected)
    assert calls == ALL


def test_lines_of_the_log(caplog, calls):
    attach._say_once.cache_clear()
    caplog.set_level("INFO")
    model = with_lora(target_modules=["q_proj", "v_proj"])
    fused(model, calls)
    assert "4 LoRA layers" in caplog.text and "sums of projections' gradients in 2 modules" in caplog.text
    assert "one by one" not in caplog.text


def test_layers_of_4_bits_keep_their_sums(caplog, calls, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tiny_model(hidden_size=64).save_pretrained(tmp_path)
    attach._say_once.cache_clear()
    caplog.set_level("INFO")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization("nf4"))
    compute_alike(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    expected = run(model)
    assert_same(run(fused(model, calls)), expected)
    assert calls == [] and "are summed one by one, of peft.Linear4bit" in caplog.text


def test_undone_it_is_the_model_of_before(calls):
    model = with_lora()
    classes, expected, printed = [type(module) for module in model.modules()], run(model), str(model)
    assert str(fused(model, calls)) == printed and [type(module) for module in model.modules()] != classes
    changes_of(base_model(model)).undo(FUSED_LAYERS)
    undone = run(model)
    assert [type(module) for module in model.modules()] == classes and calls == []
    assert all(torch.equal(undone[1][name], gradient) for name, gradient in expected[1].items())
