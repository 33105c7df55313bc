"""RMSNorm in one pass: transformers' numbers and rounding, gradients, and what backward keeps."""

import pytest
import torch

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from trl_fast.ops.layers import rms_norm

EPS = 1e-5
SHAPES = [(3, 7, 20), (130, 9), (1, 64), (0, 16), (2, 0, 16), (5, 1), (33,)]


def llama(x, weight):
    upcast = x.to(torch.float32)
    upcast = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * upcast.to(x.dtype)


def gemma(x, weight):
    upcast = x.float()
    upcast = upcast * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + EPS)
    return (upcast * (1.0 + weight.float())).type_as(x)


def exact(cast):
    def norm(x, weight):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return normed * (1 + weight) if cast == "gemma" else normed * weight

    return norm


PLAIN = {"llama": llama, "gemma": gemma}


def ours(cast, backend):
    return lambda x, weight: rms_norm(x, weight, EPS, cast=cast, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, cast, backend):
    given = draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)
    check_errors(ours(cast, backend), PLAIN[cast], exact(cast), given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_transformers(dtype, cast, backend):
    """One rounding elsewhere would change a tenth of the numbers; float32's sums change hardly any."""
    x, weight = draw(64, 576, dtype=dtype).detach(), draw(576, seed=1, dtype=dtype).detach()
    same = ours(cast, backend)(x, weight) == PLAIN[cast](x, weight)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e18])
def test_huge_and_tiny_numbers(scale, backend):
    """Against float64: autograd through transformers' code loses the cube of tiny factors."""
    given = draw(3, 20, scale=scale), draw(20, seed=1)
    upcast = [t.detach().double().requires_grad_() for t in given]
    for got, want in zip(results(ours("llama", backend), given), results(exact("llama"), upcast), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_seen(backend):
    x = torch.ones(3, 20)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    got = rms_norm(x, torch.ones(20), EPS, backend=backend)
    assert got[0].isnan().all() and got[1, 5].isnan() and got[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_and_gradients(backend):
    whole, weight = draw(20, 6, 4), draw(20, seed=1)
    function = ours("llama", backend)
    for got, want in zip(
        results(lambda w, g: function(w.permute(2, 1, 0), g).transpose(0, 1), (whole, weight)),
        results(lambda w, g: llama(w.permute(2, 1, 0), g).transpose(0, 1), (whole, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen, backend):
    given = draw(70, 20), draw(20, seed=1)
    expected = results(llama, given)[1 + (1 - frozen)]
    given[frozen].requires_grad_(False)
    out = ours("llama", backend)(*given)
    out.backward(draw(*out.shape, seed=7, dtype=torch.bfloat16).detach().float())
    assert given[frozen].grad is None
    torch.testing.assert_close(given[1 - frozen].grad, expected)


def test_backward_keeps_the_input_and_a_number_a_row():
    x, weight = draw(6, 20), draw(20, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    kept = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [t.shape for t in kept] == [(6,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    given = draw(3, 20), draw(20, seed=1)
    torch.library.opcheck(torch.ops.trl_fast.rms_norm.default, (*given, EPS, False, backend))
    rstd = torch.ones(3)
    backward = torch.ops.trl_fast.rms_norm_backward.default
    x, weight = (t.detach() for t in given)
    torch.library.opcheck(backward, (x, x, weight, rstd, True, True, False, backend))


@pytest.mark.parametrize(
    ("weight", "cast", "message"),
    [(torch.ones(3), "llama", "weight"), (torch.ones(20).half(), "llama", "weight"), (torch.ones(20), "t5", "cast")],
)
def test_bad_input(weight, cast, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 20), weight, EPS, cast=cast)


def test_a_second_derivative_is_refused():
    x, weight = draw(3, 20), draw(20, seed=1)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, EPS).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
