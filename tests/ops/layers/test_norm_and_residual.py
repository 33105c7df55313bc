"""RMSNorm that hands its input on: numbers of transformers, and one pass for the gradients of both."""

import pytest
import torch

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from support.plain_norms import EPS, NORM_SHAPES, PLAIN_NORMS, exact_norm
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import norm_and_residual, rms_norm


def ours(cast, backend):
    return lambda x, weight: norm_and_residual(x, weight, EPS, cast=cast, backend=backend)


def beside(norm):
    """A norm and its input, as two uses of it."""
    return lambda x, weight: (norm(x, weight), x.clone())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, cast, backend):
    given = draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)
    check_errors(ours(cast, backend), beside(PLAIN_NORMS[cast]), beside(exact_norm(cast)), given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norm_is_that_of_rms_norm(backend):
    x, weight = draw(5, 20), draw(20, seed=1)
    y, residual = norm_and_residual(x, weight, EPS, backend=backend)
    assert torch.equal(y, rms_norm(x, weight, EPS, backend=backend))
    assert residual.data_ptr() == x.data_ptr()


def test_gradients_are_added_in_the_norms_pass():
    given = draw(5, 20), draw(20, seed=1)
    made = norm_and_residual(*given, EPS)
    with SeenOperators() as seen:
        torch.autograd.backward(made, [torch.ones_like(out) for out in made])
    assert "trl_fast::layer_rms_norm_backward" in seen.names and "aten::add.Tensor" not in seen.names


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    given = draw(70, 20), draw(20, seed=1)
    expected = results(beside(PLAIN_NORMS["llama"]), given)[2 + (1 - frozen)]
    given[frozen].requires_grad_(False)
    out, residual = ours("llama", None)(*given)
    grads = [draw(*out.shape, seed=7 + i, dtype=torch.bfloat16).detach().float() for i in range(2)]
    torch.autograd.backward(*((out, residual), grads) if frozen else ((out,), grads[:1]))
    assert given[frozen].grad is None
    torch.testing.assert_close(given[1 - frozen].grad, expected)


def test_backward_keeps_the_input_and_a_number_a_row():
    x, weight = draw(6, 20), draw(20, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_and_residual(x, weight, EPS)
    assert [t.shape for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())] == [(6,)]


def test_a_second_derivative_is_refused():
    x, weight = draw(3, 20), draw(20, seed=1)
    with pytest.raises(RuntimeError, match="norm_and_residual has no second derivative"):
        torch.autograd.grad(norm_and_residual(x, weight, EPS)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("weight", "cast", "message"),
    [(torch.ones(3), "llama", "weight"), (torch.ones(20).half(), "llama", "weight"), (torch.ones(20), "t5", "cast")],
)
def test_bad_input(weight, cast, message):
    with pytest.raises(ValueError, match=message):
        norm_and_residual(torch.ones(2, 20), weight, EPS, cast=cast)
