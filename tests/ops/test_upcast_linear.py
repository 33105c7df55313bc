"""The linear layer that computes in float32: against float64, its autograd, and when it serves."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from support.simulated_device import set_bf16_products
from trl_fast.ops.upcast_linear import MIN_ROWS, upcast_is_faster, upcast_linear


def tensors(dtype, shape=(3, 7, 20), out=11, bias=True):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator) for size in (shape, (out, shape[-1]), (out,))]
    x, weight, b = (value.to(dtype).requires_grad_() for value in drawn)
    return x, weight, b if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 20), (5, 20), (0, 20), (1, 1, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(dtype, shape, bias):
    """Forward and backward are the exact results, rounded once to their dtype, or next to it."""
    given = [t for t in tensors(dtype, shape, bias=bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in given]
    out, right = upcast_linear(*given, *[None] * (3 - len(given))), F.linear(*exact)
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


def test_every_product_is_of_float32():
    given = tensors(torch.bfloat16, (5, 20))
    with Products() as seen:
        # The body: a mode sees an op from outside only.
        upcast_linear._init_fn(*(t.detach() for t in given))
    assert seen.dtypes and set(seen.dtypes) == {torch.float32}
    with Products() as seen:
        upcast_linear(*given).sum().backward()
    assert len(seen.dtypes) == 4 and set(seen.dtypes) == {torch.float32}


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, weight, bias = tensors(torch.bfloat16)
    named = {"x": x, "weight": weight, "bias": bias}
    named[frozen].requires_grad_(False)
    upcast_linear(x, weight, bias).sum().backward()
    assert {name for name, t in named.items() if t.grad is None} == {frozen}


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    torch.library.opcheck(torch.ops.trl_fast.upcast_linear.default, tensors(torch.bfloat16, bias=bias))


def test_backward_keeps_narrow_tensors_alone():
    x, weight, bias = tensors(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        upcast_linear(x, weight, bias)
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
