"""Norms, gated MLPs and rotary embeddings in one pass: what is recognised, its numbers, and undoing it."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import types
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from benchmarks.families import tiny_config
from support.models import tiny_model
from trl_fast.modeling.fused_layers import FUSED_LAYERS, fuse_layers, try_outs
from trl_fast.modeling.fused_layers.fused_classes import fused_class_for
from trl_fast.modeling.fused_layers.rotary_functions import restore_function
from trl_fast.modeling.fused_layers.try_outs import Draw
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.tiled_mlp import tile_mlps
from trl_fast.ops.device import device_facts, simulated_device

CPU = torch.device("cpu")
IDS = torch.randint(3, 340, (2, 13), generator=torch.Generator().manual_seed(0))
# Norms, gated MLPs, layers that add and normalise at once and attentions, those that normalise and turn at once and
# those whose projections sum their gradients, and whether queries and keys are turned in one pass.
FUSED = {
    "llama": (5, 2, 2, 2, True),
    "qwen2": (5, 2, 2, 2, True),
    "qwen3": (9, 2, 2, 2, True),  # norms of queries and keys
    "gemma": (5, 2, 2, 2, True),
    "gemma2": (9, 2, 2, 2, True),
    "gemma3_text": (13, 2, 2, 2, True),
    "qwen3_next": (7, 2, 2, 1, True),  # a gate beside the queries; a part of each head is turned
    "gemma4_text": (30, 4, 4, 0, True),  # some norms have no weight; its function turns one tensor
    "granite": (5, 2, 2, 2, True),  # what is added is multiplied first
    "cohere": (3, 2, 0, 2, True),  # by PyTorch's layer_norm
    "olmo2": (9, 2, 0, 2, True),
    "phi3": (5, 2, 2, 0, True),  # one layer gives gate and up
    "glm4": (9, 2, 2, 2, True),  # and a part of each head is turned, by pairs
    "gpt_neox": (0, 0, 0, 0, True),
    "gpt_oss": (5, 0, 2, 2, True),  # half of the angles
    "deepseek_v3": (9, 2, 2, 0, True),
    "ernie4_5": (5, 2, 2, 2, True),
    "nanochat": (9, 0, 2, 2, False),
    "starcoder2": (0, 0, 0, 2, True),
}
OPS = {
    "fused_classes": ["rms_norm", "norm_and_residual", "residual_rms_norm", "gated_activation"],
    "rotary_functions": ["rotary", "qk_norm_rotary"],
}


@pytest.fixture(autouse=True)
def _own_functions(monkeypatch):
    """Puts back what a model of a test changed in transformers."""
    from trl_fast.modeling.fused_layers.rotary_functions import RotaryFunction

    plain = RotaryFunction.exchange

    def exchange(function):
        modeling = sys.modules[function.module]
        monkeypatch.setattr(modeling, function.known.name, getattr(modeling, function.known.name))
        plain(function)

    monkeypatch.setattr(RotaryFunction, "exchange", exchange)


def run(model):
    """The loss, and every gradient that there is."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits.float()
    loss = logits.log_softmax(-1)[..., 5].square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, rtol=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=rtol)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= rtol * max(gradient.norm(), 1e-3), name


def errors(got, exact):
    """How far each gradient is from that of float64, as a share of it."""
    assert got[1].keys() == exact[1].keys()
    return [((got[1][name] - right).norm() / right.norm().clamp(min=1e-6)).item() for name, right in exact[1].items()]


def family_model(family):
    """A small random model in training mode whose dropout is off."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).float().train()
    disable_dropout(model)
    return model


def in_float64(model):
    """A copy of it; PyTorch has grouped products of experts in 32 bits at most."""
    exact = copy.deepcopy(model).double()
    if exact._can_set_experts_implementation():
        exact.set_experts_implementation("eager")
    return exact


def fused_modules(model):
    """Those whose code is transformers'."""
    is_theirs = "transformers.models."
    return [m for m in model.modules() if hasattr(m, "fused_class") and type(m).__module__.startswith(is_theirs)]


@pytest.mark.parametrize("family", FUSED)
def test_numbers_of_a_family(family, monkeypatch):
    calls = []
    for name in OPS["rotary_functions"]:
        monkeypatch.setattr(f"trl_fast.modeling.fused_layers.rotary_functions.{name}", counting(name, calls))
    model = family_model(family)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # What starts as ones or zeros would hide a wrong gradient.
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in name else 0.0)
    expected, names = run(model), [type(module).__name__ for module in model.modules()]
    exact = run(in_float64(model))
    fuse_layers(model, CPU)
    norms, mlps, layers, attentions, turns = FUSED[family]
    fused = [type(module) for module in fused_modules(model)]
    assert sum("Norm" in cls.__name__ for cls in fused) == norms
    assert sum("MLP" in cls.__name__ for cls in fused) == mlps
    assert sum("DecoderLayer" in cls.__name__ for cls in fused) == layers
    assert sum("Attention" in cls.__name__ for cls in fused) == attentions
    assert len(fused) == norms + mlps + layers + attentions
    rotaries = vars(sys.modules[type(model).__module__]).values()
    assert any(hasattr(value, "fused_from") for value in rotaries) is turns
    calls.clear()
    assert max(errors(run(model), exact)) <= 2 * max(errors(expected, exact)) + 1e-6
    assert (calls != []) is turns
    assert [type(module).__name__ for module in model.modules()] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    """Results are the same bits but for the odd one next to a rounding's edge."""
    model = tiny_model().to(dtype)
    expected = run(model)
    fuse_layers(model, CPU)
    assert_same(run(model), expected, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_coheres_norm(autocast, dtype):
    """Its numbers, and its own code for norms of heads, each with a weight of its own."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm

    draw = Draw(CPU, dtype)
    for shape in (24, (3, 24)):
        norm = CohereLayerNorm(shape, eps=1e-3).to(dtype)
        norm.weight.data.copy_(draw(*norm.weight.shape))
        fused = fused_class_for(norm)
        ours = fused.__new__(fused)
        vars(ours).update(vars(norm))
        x, got, expected = 2 + draw(5, 3, 24), [], []
        for module, results in ((norm, expected), (ours, got)):
            given = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(given)
            norm.weight.grad = None
            y.float().square().sum().backward()
            results += [y.detach(), given.grad, norm.weight.grad]
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
            assert (one.float() - other.float()).norm() <= rounding * other.float().norm()


def test_the_ops_run(monkeypatch):
    calls = []
    for place, names in OPS.items():
        for name in names:
            monkeypatch.setattr(f"trl_fast.modeling.fused_layers.{place}.{name}", counting(name, calls))
    model = tiny_model()
    fuse_layers(model, CPU)
    calls.clear()
    model(input_ids=IDS, use_cache=False)
    passes = {"norm_and_residual": 2, "residual_rms_norm": 2, "gated_activation": 2, "rotary": 2}
    assert Counter(calls) == {"rms_norm": 1, **passes}
    calls.clear()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert Counter(calls) == {"rms_norm": 3, "residual_rms_norm": 2, "gated_activation": 2, "rotary": 2}


def counting(name, calls):
    from trl_fast.ops import layers

    plain = getattr(layers, name)

    def call(*args, **kwargs):
        calls.append(name)
        return plain(*args, **kwargs)

    return call


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["keep", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("tile", [None, 10], ids=["whole", "tiled"])
def test_tiles_and_checkpointing(tile, checkpointing):
    model = tiny_model()
    expected = run(model)
    fuse_layers(model, CPU)
    if tile is not None:
        assert tile_mlps(model, tile) == 2
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    assert_same(run(model), expected)


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "lora"])
def test_compiled(lora):
    """A compiler sees the ops whole: no graph breaks at them."""
    model = tiny_model(num_hidden_layers=1 if lora else 2)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    expected = run(model)
    inner = base_model(model)
    fuse_layers(inner, CPU)
    torch._dynamo.reset()
    inner.model.forward = torch.compile(inner.model.forward, backend="aot_eager", fullgraph=True)
    try:
        assert_same(run(model), expected)
    finally:
        torch._dynamo.reset()


def test_adapters_are_called():
    torch.manual_seed(0)
    targets = ["gate_proj", "down_proj", "q_proj"]
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 if "lora_B" in name else 0.0)
    inner = base_model(model)
    fuse_layers(inner, CPU)
    # Keys and values sum their gradients.
    assert len(fused_modules(model)) == 11 and all(module.training for module in model.modules())
    disable_dropout(model)
    got = run(model)
    changes_of(model).undo(FUSED_LAYERS)
    assert_same(got, run(model))
    assert len(got[1]) == 2 * 2 * len(targets)


def test_hooks_of_a_norm_run():
    """Nothing that is put upon a norm is passed by: the layer then adds and normalises as before."""
    model = tiny_model()
    fuse_layers(model, CPU)
    expected, seen = run(model), []
    hooked, replaced = (layer.post_attention_layernorm for layer in model.model.layers)
    hooked.register_forward_hook(lambda *_: seen.append("hook"))
    replaced.forward = types.MethodType(
        lambda self, x: seen.append("forward") or type(self).forward(self, x), replaced
    )
    assert_same(run(model), expected)
    assert seen == ["hook", "forward"]


def test_printed_pickled_and_copied():
    model = tiny_model()
    printed, classes = str(model), [type(module) for module in model.modules()]
    fuse_layers(model, CPU)
    assert str(model) == printed
    loaded = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in loaded.modules()] == classes
    assert_same(run(loaded), run(model))
    assert len(fused_modules(copy.deepcopy(model))) == len(fused_modules(model)) == 11


def plain_function():
    """The function that all Llamas share; another test's fused model may be alive."""
    restore_function(modeling_llama.__name__, "apply_rotary_pos_emb")
    return modeling_llama.apply_rotary_pos_emb


def test_undone_it_is_the_model_of_before():
    plain = plain_function()
    model = tiny_model()
    classes, expected = [type(module) for module in model.modules()], run(model)
    fuse_layers(model, CPU)
    fuse_layers(model, CPU)
    assert changes_of(model).names == (FUSED_LAYERS,) and modeling_llama.apply_rotary_pos_emb is not plain
    copied = copy.deepcopy(model)
    assert_same(run(copied), expected)
    changes_of(model).undo_all()
    assert [type(module) for module in model.modules()] == classes
    assert modeling_llama.apply_rotary_pos_emb is plain
    found = run(model)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    changes_of(copied).undo_all()
    assert not any(hasattr(module, "fused_class") for module in copied.modules())


def test_models_that_are_gone_give_the_function_back():
    """Without an undo, when no fused model of the family is left."""
    gc.collect()  # fused models of other tests
    plain = plain_function()
    models = [tiny_model() for _ in range(3)]
    for model in models:
        fuse_layers(model, CPU)
    changes_of(models[0]).undo(FUSED_LAYERS)
    fuse_layers(models[1], CPU)
    del model, models[2]
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is not plain
    del models[1]
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is plain


class Doubled(modeling_llama.LlamaRMSNorm):
    """A norm whose code is another."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def test_what_is_not_known_stays_as_it_is():
    model = tiny_model()
    layers = model.model.layers
    layers[0].input_layernorm.__class__ = Doubled
    norm = layers[0].post_attention_layernorm
    norm.forward = types.MethodType(lambda self, x: 3 * type(self).forward(self, x), norm)
    layers[1].mlp.act_fn = nn.Softplus()
    fuse_layers(model, CPU)
    fused = fused_modules(model)
    assert fused[:2] == [layers[0].self_attn, layers[0].mlp] and layers[0] not in fused
    norms = [layers[1].input_layernorm, layers[1].post_attention_layernorm, model.model.norm]
    # Another activation's MLP still sums its projections' gradients.
    assert fused[2:] == [layers[1], layers[1].self_attn, layers[1].mlp, *norms]


def wrong(x, weight, eps, *, cast):
    return 1.01 * x


def broken(x, weight, eps, *, cast):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [(wrong, "its numbers are others than those of the module's own code"), (broken, "it failed when tried")],
)
def test_a_kernel_that_differs_or_fails_is_not_taken(kernel, reason, monkeypatch, caplog):
    monkeypatch.setattr("trl_fast.modeling.fused_layers.fused_classes.rms_norm", kernel)
    monkeypatch.setattr(try_outs, "_found", {})
    caplog.set_level("INFO")
    model = tiny_model()
    fuse_layers(model, CPU)
    assert fused_modules(model) == [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    assert f"5 modules of LlamaForCausalLM run as before. LlamaRMSNorm: {reason}" in caplog.text


def test_norms_in_float32_of_a_model_in_bfloat16():
    """Numbers of two dtypes are not the kernels': transformers' own code promotes them."""
    model = tiny_model().bfloat16()
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.float()
    fuse_layers(model, CPU)
    norm = model.model.norm
    got = norm(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).bfloat16())
    assert hasattr(norm, "fused_class") and got.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "fused_layers=True: nothing of GPT2LMHeadModel can be fused: the code of its norms"),
        ("llama", "fused_layers=True: nothing of LlamaForCausalLM can be fused: TRL_FAST_BACKEND=torch; leave it out"),
    ],
)
def test_refused(family, message, monkeypatch, caplog):
    """Where nothing can be fused it is an error if it is asked for, and else a line."""
    monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
    caplog.set_level("INFO")
    model = tiny_model(family)
    with simulated_device(replace(device_facts(CPU), own_products=False)):
        with pytest.raises(ValueError, match=message):
            fuse_layers(model, CPU, required=True)
        assert not caplog.text
        fuse_layers(model, CPU)
    assert FUSED_LAYERS not in changes_of(model)
    assert f"fused_layers: nothing of {type(model).__name__} runs in one pass: " in caplog.text
