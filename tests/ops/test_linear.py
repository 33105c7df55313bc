"""The linear layer that computes in float32: against float64, its autograd, and when it serves."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support.simulated_device import set_bf16_products
from trl_fast.ops.device import device_facts, simulated_device
from trl_fast.ops.linear import MIN_ROWS, _linear, _linear_backward, linear, upcast_is_faster

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["own products", "ATen's products"])
def products(request):
    """A CPU without 16-bit products, whose float32 products are ours or ATen's."""
    with simulated_device(replace(device_facts(CPU), own_products=request.param, multiplies_bf16=False)):
        yield request.param


def tensors(dtype, shape=(3, 7, 20), out=11, bias=True):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator) for size in (shape, (out, shape[-1]), (out,))]
    x, weight, b = (value.to(dtype).requires_grad_() for value in drawn)
    return x, weight, b if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 20), (5, 20), (0, 20), (1, 1, 20), (20,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounds_once(dtype, shape, bias, products):
    """Forward and backward are the exact results, rounded once to their dtype, or next to it."""
    given = [t for t in tensors(dtype, shape, bias=bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    out, right = linear(*given, *[None] * (3 - len(given))), F.linear(*exact)
    grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = (out, *torch.autograd.grad(out, given, grad))
    expected = (right, *torch.autograd.grad(right, exact, grad.double()))
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


class Products(TorchDispatchMode):
    """Dtypes of what products take."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::mm", "aten::addmm"):
            self.dtypes += [factor.dtype for factor in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("products", [False], indirect=True)
def test_every_product_is_of_float32(products, autocast):
    x, weight, bias = (t.detach() for t in tensors(torch.bfloat16, (5, 20)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as seen:
        # The bodies: a mode sees an op from outside only.
        _linear._init_fn(x, weight, bias)
        _linear_backward._init_fn(torch.ones(5, 11, dtype=torch.bfloat16), x, weight, True)
    assert len(seen.dtypes) == 6 and set(seen.dtypes) == {torch.float32}


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen, products):
    x, weight, bias = tensors(torch.bfloat16)
    named = {"x": x, "weight": weight, "bias": bias}
    named[frozen].requires_grad_(False)
    linear(x, weight, bias).sum().backward()
    assert {name for name, t in named.items() if t.grad is None} == {frozen}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, bias, products):
    torch.library.opcheck(torch.ops.trl_fast.linear.default, tensors(dtype, bias=bias))


def test_backward_keeps_narrow_tensors_alone():
    x, weight, bias = tensors(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize(
    "dtype, hardware, rows, expected",
    [
        (torch.bfloat16, False, MIN_ROWS, True),
        (torch.bfloat16, False, MIN_ROWS - 1, False),
        (torch.bfloat16, True, 100, False),
        (torch.float16, True, 100, True),
        (torch.float32, False, 100, False),
    ],
)
def test_serves(dtype, hardware, rows, expected, monkeypatch):
    set_bf16_products(monkeypatch, hardware)
    assert upcast_is_faster(torch.empty(rows, 8, dtype=dtype), dtype) is expected
    assert not upcast_is_faster(torch.empty(rows, 8, dtype=dtype, device="meta"), dtype)


def test_layouts_and_a_retained_graph(products):
    """Any strides serve, also those of an expanded gradient, and backward may be asked again."""
    x, weight, _ = tensors(torch.float32, (6, 20))
    turned, narrow = x.detach().t().contiguous().t().requires_grad_(), weight.detach()[:, ::2].requires_grad_()
    out = linear(turned[:, ::2], narrow)
    first, again = (torch.autograd.grad(out.sum(), (turned, narrow), retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(F.linear(turned[:, ::2], narrow).sum(), (turned, narrow))
    for a, b, c in zip(first, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_second_derivatives_are_refused(products):
    x, weight, bias = tensors(torch.float32)
    grad = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="linear_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_what_does_not_fit_is_refused(what):
    x, weight, bias = tensors(torch.float32)
    for bad in ({"weight": weight[:, 1:], "bias": bias[1:]}[what], {"weight": weight, "bias": bias}[what].double()):
        given = {"weight": weight, "bias": bias, what: bad}
        with pytest.raises(ValueError, match=f"^{what}: expected"):
            linear(x, **given)
