"""Gated activations in one pass: PyTorch's numbers and rounding, gradients, and what backward keeps."""

import pytest
import torch
import torch.nn.functional as F

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from trl_fast.ops.layers import ACTIVATIONS, gated_activation

SHAPES = [(3, 7, 20), (1, 9), (0, 16), (1, 1), (2, 1031)]
PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain(activation):
    return lambda gate, up: PLAIN[activation](gate) * up


def ours(activation, backend):
    return lambda gate, up: gated_activation(gate, up, activation, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, activation, backend):
    given = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, seed=1, dtype=dtype)
    check_errors(ours(activation, backend), plain(activation), plain(activation), given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_pytorch(dtype, activation, backend):
    """Far below 0, where PyTorch's GELU cancels, ours is nearer to the exact one; so no gates from there."""
    gate = draw(64, 33, dtype=dtype, scale=3.0).detach().clamp(min=-1).requires_grad_()
    given = gate, draw(64, 33, seed=1, dtype=dtype)
    for got, want in zip(results(ours(activation, backend), given), results(plain(activation), given), strict=True):
        assert (got == want).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_values(activation, dtype):
    """Far from 0 the activation is x or 0, and its derivative 1 or 0: nothing overflows on the way, as in PyTorch."""
    far = torch.tensor([1e3, 89.0, 87.5, 100.0, 1e10, 3e38, -1e3, -89.0, -87.5, -1e10, -3e38])
    far = far.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).requires_grad_()
    up = torch.ones_like(far).requires_grad_()
    out = gated_activation(far, up, activation, backend="cpp")
    gradients, values = torch.autograd.grad(out.sum(), (far, up))
    right = far.detach().clamp(min=0)
    for got, want in ((out, right), (values, right), (gradients, (right > 0).to(dtype))):
        torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_seen(activation, backend):
    gate, up = torch.tensor([float("nan"), 1.0, 2.0]), torch.tensor([1.0, float("nan"), 2.0])
    assert gated_activation(gate, up, activation, backend=backend).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    both = draw(14, 6)

    def split(function):
        return lambda b: function(*b.t().chunk(2, dim=-1)).t()

    for got, want in zip(
        results(split(ours("silu", backend)), (both,)), results(split(plain("silu")), (both,)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_backward_keeps_gate_and_up():
    gate, up = draw(6, 20), draw(6, 20, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_activation(gate, up)
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    given = draw(3, 20), draw(3, 20, seed=1)
    torch.library.opcheck(torch.ops.trl_fast.gated_activation.default, (*given, "silu", backend))
    gate, up = (t.detach() for t in given)
    torch.library.opcheck(torch.ops.trl_fast.gated_activation_backward.default, (gate, gate, up, "gelu_tanh", backend))


@pytest.mark.parametrize(
    ("up", "activation", "message"),
    [(torch.ones(2, 3), "silu", "up"), (torch.ones(2, 20).half(), "silu", "up"), (torch.ones(2, 20), "relu", "relu")],
)
def test_bad_input(up, activation, message):
    with pytest.raises(ValueError, match=message):
        gated_activation(torch.ones(2, 20), up, activation)
