"""The residual sum and its norm in one pass: transformers' numbers and rounding, and gradients of both results."""

import pytest
import torch

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from support.plain_norms import EPS, NORM_SHAPES, PLAIN_NORMS, exact_norm
from trl_fast.ops.layers import residual_rms_norm, rms_norm


def plain(norm):
    def both(x, residual, weight):
        total = residual + x
        return norm(total, weight), total

    return both


def ours(cast, backend):
    return lambda x, residual, weight: residual_rms_norm(x, residual, weight, EPS, cast=cast, backend=backend)


def inputs(*shape, dtype=torch.float32):
    return draw(*shape, dtype=dtype), draw(*shape, seed=2, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, cast, backend):
    check_errors(ours(cast, backend), plain(PLAIN_NORMS[cast]), plain(exact_norm(cast)), inputs(*shape, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_transformers(dtype, cast, backend):
    """Forward, and the gradient by the stream, which is rounded before the other one is added."""
    given = inputs(64, 576, dtype=dtype)
    found = results(ours(cast, backend), given), results(plain(PLAIN_NORMS[cast]), given)
    for (got, want), share in zip(zip(*found, strict=True), (0.999, 1, 0.95, 0.95, 0), strict=True):
        assert (got == want).float().mean() >= share


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_norm_of_the_sum_bit_by_bit(backend):
    x, residual, weight = (t.detach() for t in inputs(9, 33))
    normed, total = residual_rms_norm(x, residual, weight, EPS, backend=backend)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, EPS, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_a_gradient(used, backend):
    given = inputs(7, 20)
    got, want = (
        torch.autograd.grad(f(*given)[used].square().sum(), given, allow_unused=True)
        for f in (ours("llama", backend), plain(PLAIN_NORMS["llama"]))
    )
    for ours_, theirs in zip(got, want, strict=True):
        assert (ours_ is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours_, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_is_frozen_gets_no_gradient(frozen, backend):
    given = inputs(70, 20)
    expected = results(plain(PLAIN_NORMS["llama"]), given)[2:]
    given[frozen].requires_grad_(False)
    outs = ours("llama", backend)(*given)
    grads = [draw(*o.shape, seed=7 + i, dtype=torch.bfloat16).detach().float() for i, o in enumerate(outs)]
    torch.autograd.backward(outs, grads)
    assert given[frozen].grad is None
    for i in {0, 1, 2} - {frozen}:
        torch.testing.assert_close(given[i].grad, expected[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_and_gradients(backend):
    x, residual, weight = inputs(20, 6, 4)[0], draw(4, 20, 6, seed=2), draw(20, seed=1)

    def run(function):
        return lambda a, b, w: tuple(t.transpose(0, 1) for t in function(a.permute(2, 1, 0), b.mT, w))

    given = x, residual, weight
    theirs = results(run(plain(PLAIN_NORMS["llama"])), given)
    for got, want in zip(results(run(ours("llama", backend)), given), theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_backward_keeps_the_sum_and_a_number_a_row():
    x, residual, weight = inputs(6, 20)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total = residual_rms_norm(x, residual, weight, EPS)
    kept = [t for t in saved if t.data_ptr() not in (total.data_ptr(), weight.data_ptr())]
    assert [t.shape for t in kept] == [(6,)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    op = torch.ops.trl_fast.residual_rms_norm.default
    torch.library.opcheck(op, (*inputs(3, 20), EPS, "gemma", backend))
    torch.library.opcheck(op, (*inputs(3, 20)[:2], None, EPS, "llama", backend))


@pytest.mark.parametrize("residual", [torch.ones(2, 19), torch.ones(2, 20).half()])
def test_bad_input(residual):
    with pytest.raises(ValueError, match="residual"):
        residual_rms_norm(torch.ones(2, 20), residual, None, EPS)


def test_a_second_derivative_is_refused():
    x, residual, weight = inputs(3, 20)
    for backend in (None, "torch"):
        normed, total = residual_rms_norm(x, residual, weight, EPS, backend=backend)
        with pytest.raises(RuntimeError):
            torch.autograd.grad((normed * total).sum(), x, create_graph=True)[0].sum().backward()
