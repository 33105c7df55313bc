"""RMSNorm in one pass: transformers' numbers and rounding, gradients, and what backward keeps."""

import pytest
import torch

from support.layer_errors import BACKENDS, DTYPES, check_errors, draw, results
from support.plain_norms import EPS, NORM_SHAPES, PLAIN_NORMS, exact_norm, llama, olmo
from support.seen_operators import SeenOperators
from trl_fast.ops.layers import rms_norm


def ours(cast, backend):
    return lambda x, weight: rms_norm(x, weight, EPS, cast=cast, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_error_is_that_of_pytorch(shape, dtype, cast, backend):
    given = draw(*shape, dtype=dtype), draw(shape[-1], seed=1, dtype=dtype)
    check_errors(ours(cast, backend), PLAIN_NORMS[cast], exact_norm(cast), given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bits_are_those_of_transformers(dtype, cast, backend):
    """One rounding elsewhere would change a tenth of the numbers; float32's sums change hardly any."""
    x, weight = draw(64, 576, dtype=dtype).detach(), draw(576, seed=1, dtype=dtype).detach()
    same = ours(cast, backend)(x, weight) == PLAIN_NORMS[cast](x, weight)
    assert same.float().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e18])
def test_huge_and_tiny_numbers(scale, backend):
    """Against float64: autograd through transformers' code loses the cube of tiny factors."""
    given = draw(3, 20, scale=scale), draw(20, seed=1)
    upcast = [t.detach().double().requires_grad_() for t in given]
    for got, want in zip(results(ours("llama", backend), given), results(exact_norm("llama"), upcast), strict=True):
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
@pytest.mark.parametrize("cast", PLAIN_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_weight(dtype, cast, backend):
    given = (draw(5, 20, dtype=dtype),)
    ones = torch.ones(20, dtype=dtype)
    check_errors(
        lambda x: rms_norm(x, None, EPS, cast=cast, backend=backend),
        lambda x: olmo(x, ones),
        lambda x: exact_norm("olmo")(x, ones.double()),
        given,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arrange", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (1, 0, 3, 2)], ids=str)
def test_heads_of_any_strides(arrange, backend):
    """Up to three dimensions of rows that are not joined, in the input and in the gradient of the result."""
    whole, weight = draw(3, 5, 4, 20)[:, :, 1:], draw(20 if arrange[3] == 3 else 3, seed=1)

    def run(function):
        return lambda w, g: function(w.permute(arrange), g).transpose(0, 2).contiguous().transpose(1, 2)

    given = whole.detach().requires_grad_(), weight
    for got, want in zip(results(run(ours("llama", backend)), given), results(run(llama), given), strict=True):
        torch.testing.assert_close(got, want)


def test_head_views_are_not_copied():
    """The kernel gets the heads of a fused projection where they lie."""
    heads = torch.randn(2, 5, 3 * 4 * 8).unflatten(-1, (3, 4, 8))[:, :, 1].transpose(1, 2)
    with SeenOperators() as seen:
        got = rms_norm(heads, torch.ones(8), EPS, backend="cpp")
    given = seen.arguments[seen.names.index("trl_fast::layer_rms_norm")]
    assert given[0].data_ptr() == heads.data_ptr()
    torch.testing.assert_close(got, llama(heads, torch.ones(8)))


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
    torch.library.opcheck(torch.ops.trl_fast.rms_norm.default, (*given, EPS, "llama", backend))
    rstd = torch.ones(3)
    backward = torch.ops.trl_fast.rms_norm_backward.default
    x, weight = (t.detach() for t in given)
    torch.library.opcheck(backward, (x, None, x, weight, rstd, "gemma", True, False, backend))
    torch.library.opcheck(backward, (x, x, x, None, rstd, "olmo", True, True, backend))


@pytest.mark.parametrize(
    ("weight", "cast", "message"),
    [(torch.ones(3), "llama", "weight"), (torch.ones(20).half(), "llama", "weight"), (torch.ones(20), "t5", "cast")],
)
def test_bad_input(weight, cast, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.ones(2, 20), weight, EPS, cast=cast)
    with pytest.raises(ValueError, match="x: "):
        rms_norm(torch.ones(2, 0), None, EPS)


def test_a_second_derivative_is_refused():
    x, weight = draw(3, 20), draw(20, seed=1)
    for backend in (None, "torch"):
        out = rms_norm(x, weight, EPS, backend=backend).sum()
        with pytest.raises(RuntimeError):
            torch.autograd.grad(out, x, create_graph=True)[0].sum().backward()
