"""Linear layers with a low-rank adapter: PEFT's numbers, gradients of everything, and what backward keeps."""

import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from support.layer_errors import DTYPES, check_errors, draw, results
from trl_fast.ops.layers import lora_linear

SCALING = 1.5
SHAPES = [(3, 7, 20, 12, 4), (1, 1, 8, 8, 1), (0, 5, 8, 16, 2), (2, 33, 96, 80, 8)]
# The dtype of the layer and that of the adapter.
PAIRS_OF_DTYPES = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in DTYPES[1:]]


def peft(x, weight, bias, a, b):
    """Linear.forward of peft.tuners.lora.layer."""
    y = F.linear(x, weight, bias)
    return (y + F.linear(F.linear(x.to(a.dtype), a), b) * SCALING).to(y.dtype)


def ours(x, weight, bias, a, b):
    return lora_linear(x, weight, bias, a, b, SCALING)


def inputs(batch, tokens, width, outputs, rank, dtype=torch.float32, adapter=None):
    scale = width**-0.5
    layer = draw(outputs, width, seed=1, scale=scale, dtype=dtype), draw(outputs, seed=2, dtype=dtype)
    adapter = adapter or dtype
    lora = draw(rank, width, seed=3, scale=scale, dtype=adapter), draw(outputs, rank, seed=4, dtype=adapter)
    return draw(batch, tokens, width, dtype=dtype), *layer, *lora


@pytest.mark.parametrize(("dtype", "adapter"), PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_peft(shape, has_bias, dtype, adapter):
    x, weight, bias, a, b = inputs(*shape, dtype, adapter)
    if has_bias:
        return check_errors(ours, peft, peft, (x, weight, bias, a, b))
    ways = (lambda *t, f=f: f(*t[:2], None, *t[2:]) for f in (ours, peft, peft))
    check_errors(*ways, (x, weight, a, b))


def autocast(function):
    def run(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*given)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_under_autocast_is_that_of_peft(shape, dtype):
    """Base weights of either width, and an adapter in float32, as PEFT makes it."""
    given = inputs(*shape, dtype, torch.float32)
    check_errors(autocast(ours), autocast(peft), peft, given)
    assert autocast(ours)(*given).dtype == torch.bfloat16


def test_autocast_casts_the_input_once():
    """The rest of what PEFT's layer keeps of it are its casts to the adapter's dtype and back."""

    def kept(function):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
            autocast(function)(*given)
        return sum(t.nbytes for t in saved.values() if t.shape[-1] == 20 and t.numel() == 3 * 7 * 20)

    given = inputs(3, 7, 20, 12, 4, torch.bfloat16, torch.float32)
    assert kept(ours) == 2 * 3 * 7 * 20 < kept(peft)


def test_autocast_leaves_float64_alone():
    x, *rest = inputs(3, 7, 20, 12, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="weight"):
        ours(x.double(), *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cpu_that_multiplies_in_float32_by_the_library(dtype, monkeypatch):
    """Products of 16 bits are then computed in float32 and rounded once."""
    module = sys.modules["trl_fast.ops.matmul"]
    monkeypatch.setattr(module, "own_product_serves", lambda *_: False)
    monkeypatch.setattr(module, "product_dtype", lambda *_: torch.float32)
    check_errors(ours, peft, peft, inputs(3, 7, 20, 12, 4, dtype))


def test_numbers_of_a_peft_model():
    model = torch.nn.Sequential(torch.nn.Linear(20, 12))
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(model, config).base_model.model[0]
    x = draw(3, 20)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    got = lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, a, b, layer.scaling["default"])
    torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("trained", [(0,), (3, 4), (0, 3, 4), (1, 2), (2,), (4,)], ids=str)
def test_only_what_trains_gets_a_gradient(trained):
    given = inputs(3, 7, 20, 12, 4)
    expected = results(peft, given)[1:]
    for i, tensor in enumerate(given):
        tensor.requires_grad_(i in trained)
    ours(*given).backward(draw(3, 7, 12, seed=7, dtype=torch.bfloat16).detach().float())
    for i, (tensor, want) in enumerate(zip(given, expected, strict=True)):
        if i in trained:
            torch.testing.assert_close(tensor.grad, want)
        else:
            assert tensor.grad is None


def test_strided_inputs_and_gradients():
    x, *rest = inputs(3, 7, 20, 12, 4)
    whole = draw(20, 7, 3)

    def run(function):
        return lambda w, *t: function(w.permute(2, 1, 0), *t).transpose(0, 1)

    for got, want in zip(results(run(ours), (whole, *rest)), results(run(peft), (whole, *rest)), strict=True):
        torch.testing.assert_close(got, want)


def test_backward_keeps_the_input_and_the_low_rank_product():
    given = inputs(3, 7, 20, 12, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(*given)
    pointers = {t.data_ptr() for t in given}
    assert [t.shape for t in saved if t.data_ptr() not in pointers] == [(21, 4)]


def test_a_retained_graph_gives_the_gradient_again():
    given = inputs(3, 7, 20, 12, 4)
    y = ours(*given).square().sum()
    first, second = (torch.autograd.grad(y, given, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("frozen", [(), (1, 2)], ids=str)
def test_opcheck(frozen):
    given = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(inputs(3, 7, 20, 12, 4))]
    torch.library.opcheck(torch.ops.trl_fast.lora_linear.default, (*given, SCALING))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.int(), "x"),
        (1, lambda t: t[:, 1:], "weight"),
        (2, lambda t: t.half(), "bias"),
        (3, lambda t: t.half(), "lora_a"),
        (4, lambda t: t[1:], "lora_b"),
        (4, lambda t: t.half(), "lora_b"),
    ],
)
def test_bad_input(place, change, message):
    given = [change(t) if i == place else t for i, t in enumerate(inputs(3, 7, 20, 12, 4))]
    with pytest.raises(ValueError, match=message):
        ours(*given)


def test_a_second_derivative_is_refused():
    given = inputs(3, 7, 20, 12, 4)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(ours(*given).square().sum(), given[0], create_graph=True)
        grad.sum().backward()
