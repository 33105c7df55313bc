"""Norms, gated MLPs and rotary embeddings in one pass: what is recognised, its numbers, and undoing it."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama import modeling_llama

from support.models import tiny_model
from trl_fast.modeling.fused_layers import FUSED_LAYERS, fuse_layers, try_outs
from trl_fast.modeling.loading import base_model, disable_dropout
from trl_fast.modeling.model_changes import changes_of
from trl_fast.modeling.tiled_mlp import tile_mlps

CPU = torch.device("cpu")
IDS = torch.randint(3, 340, (2, 13), generator=torch.Generator().manual_seed(0))
# Norms and MLPs of two layers, and the last norm; with the norms of queries and keys.
FUSED = {"llama": (5, 2), "qwen2": (5, 2), "qwen3": (9, 2), "gemma": (5, 2), "granite": (5, 2), "cohere": (0, 2)}
OPS = [("fused_classes", "rms_norm"), ("fused_classes", "gated_activation"), ("rotary_functions", "rotary")]
TURNS = {"llama", "qwen2", "qwen3", "gemma", "granite"}


@pytest.fixture(autouse=True)
def _own_functions(monkeypatch):
    """Puts back what a model of a test changed in transformers."""
    for family in TURNS:
        modeling = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["_"])
        monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)


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


def fused_modules(model):
    return [module for module in model.modules() if hasattr(module, "fused_class")]


@pytest.mark.parametrize("family", FUSED)
def test_numbers_of_a_family(family):
    model = tiny_model(family)
    modeling = __import__(type(model).__module__, fromlist=["_"])
    # What starts as ones or zeros would hide a wrong gradient.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1 if "norm" in name else 0.0)
    expected, names = run(model), [type(module).__name__ for module in model.modules()]
    fuse_layers(model, CPU)
    fused = fused_modules(model)
    mlps = [module for module in fused if hasattr(module, "gate_proj")]
    assert (len(fused) - len(mlps), len(mlps)) == FUSED[family]
    assert hasattr(modeling.apply_rotary_pos_emb, "fused_from") is (family in TURNS)
    assert_same(run(model), expected)
    assert [type(module).__name__ for module in model.modules()] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype):
    """Results are the same bits but for the odd one next to a rounding's edge."""
    model = tiny_model().to(dtype)
    expected = run(model)
    fuse_layers(model, CPU)
    assert_same(run(model), expected, rtol=2e-2)


def test_the_ops_run(monkeypatch):
    calls = []
    for place, name in OPS:
        monkeypatch.setattr(f"trl_fast.modeling.fused_layers.{place}.{name}", counting(name, calls))
    model = tiny_model()
    fuse_layers(model, CPU)
    calls.clear()
    model(input_ids=IDS, use_cache=False)
    assert [calls.count(name) for name in ("rms_norm", "gated_activation", "rotary")] == [5, 2, 2]


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


@pytest.mark.slow
def test_compiled():
    """A compiler sees the ops whole: no graph breaks at them."""
    model = tiny_model()
    expected = run(model)
    fuse_layers(model, CPU)
    torch._dynamo.reset()
    model.model.forward = torch.compile(model.model.forward, backend="aot_eager", fullgraph=True)
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
    assert len(fused_modules(model)) == 7 and all(module.training for module in model.modules())
    disable_dropout(model)
    got = run(model)
    changes_of(model).undo(FUSED_LAYERS)
    assert_same(got, run(model))
    assert len(got[1]) == 2 * 2 * len(targets)


def test_undone_it_is_the_model_of_before():
    model, plain = tiny_model(), modeling_llama.apply_rotary_pos_emb
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
    assert not fused_modules(copied)


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
    assert fused == [layers[0].mlp, layers[1].input_layernorm, layers[1].post_attention_layernorm, model.model.norm]


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
    assert fused_modules(model) == [layer.mlp for layer in model.model.layers]
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
    ("family", "device", "message"),
    [
        ("gpt2", "cpu", "fused_layers=True: nothing of GPT2LMHeadModel can be fused: the code of its norms"),
        ("llama", "cuda", "can be fused: there is no triton kernel of it, only one in C..; leave it out"),
    ],
)
def test_refused(family, device, message):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=message):
        fuse_layers(model, torch.device(device), required=True)
    assert FUSED_LAYERS not in changes_of(model)
