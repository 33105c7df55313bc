"""Layers of 4 and 8 bits by bitsandbytes: the same product in evaluation and training, and what is kept of it."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from support.low_bit import low_bit_layers, quantization
from support.models import save_tiny_model
from support.tokenizer import build_tokenizer
from trl_fast.modeling.low_bit_layers import bits_of, compute_alike, dequantized_weight, train_in_bfloat16
from trl_fast.modeling.model_changes import changes_of

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("wide"), build_tokenizer(), hidden_size=64)


def loaded(path, kind, **more):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization(kind, **more))


def of_layer(path, kind):
    """A model's layer, and the weight that it was made of."""
    model = loaded(path, kind)
    compute_alike(model)
    whole = AutoModelForCausalLM.from_pretrained(path).model.layers[0].mlp.up_proj.weight
    return model.model.layers[0].mlp.up_proj, whole.detach()


@pytest.mark.parametrize("kind, bits, error", [("nf4", 4, 0.16), ("fp4", 4, 0.25), ("int8", 8, 1 / 127)])
def test_a_weight_is_dequantized(kind, bits, error, path):
    layer, whole = of_layer(path, kind)
    assert bits_of(layer) == bits and bits_of(torch.nn.Linear(2, 2)) is None and bits_of(torch.nn.GELU()) is None
    before = dequantized_weight(layer)
    # The largest weight of those that share a constant is exact, and the others are off by a share of it.
    blocks = whole.reshape(-1, 64)
    distance = (before.reshape(-1, 64) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
    assert before.shape == whole.shape and 0 < distance.max() < error
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ before.T)
    # What the first pass changes in a layer of 8 bits changes no weight.
    assert torch.equal(dequantized_weight(layer), before)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluation_computes_what_training_does(kind, path, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    layer, _ = of_layer(path, kind)
    x = torch.randn(5, 64, requires_grad=True)
    trained = layer.train()(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x.detach()), trained)
    assert not layer.training
    (gradient,) = torch.autograd.grad(layer.train()(x).sum(), x)
    torch.testing.assert_close(gradient, dequantized_weight(layer).sum(0).expand(5, -1))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_inputs_are_not_kept(kind, path):
    layer, _ = of_layer(path, kind)
    x = torch.randn(5, 64, requires_grad=True) * 2
    out, kept = layer(x), weakref.ref(x)
    del x
    assert kept() is None
    out.sum().backward()


def test_inputs_are_not_kept_by_the_product_of_gpus(path, monkeypatch):
    functions = bitsandbytes.autograd._functions
    monkeypatch.setattr(functions, "MatMul8bitFp", functions.MatMul8bitLt)
    test_inputs_are_not_kept("int8", path)


def test_the_change_can_be_undone(path):
    model = loaded(path, "int8")
    layer = low_bit_layers(model)[0]
    compute_alike(model)
    compute_alike(model)
    assert "forward" in vars(layer)
    changes_of(model).undo_all()
    assert "forward" not in vars(layer) and "trl_fast_forward" not in vars(layer)


def test_what_trains_becomes_bfloat16_but_for_magnitudes(path):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(loaded(path, "nf4"), config)
    train_in_bfloat16(model)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.dtype == (torch.float32 if "magnitude" in name else torch.bfloat16)
