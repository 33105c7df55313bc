"""linear_divergence on every backend: values, gradients, outputs, and shapes that break things."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from support.divergences import EVERYTHING, KINDS, make_divergence, row_divergences
from support.heads import FLOOR, assert_as_good
from trl_fast.ops import linear_divergence, supports
from trl_fast.ops.linear_divergence import _linear_divergence

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def serving(backend):
    """A backend that has a kernel of the divergence."""
    support = supports("linear_divergence", backend, "cpu", torch.float32)
    if not support.ok:
        pytest.skip(support.reason)
    return backend


def check(problem, backend, **named):
    """Holds values and gradients to float64, where PyTorch in the same dtype tells what may be lost."""
    baseline, exact = problem.answer(), problem.answer(torch.float64)
    got = problem.run(backend=backend, **named)
    gradients = torch.autograd.grad(3 * got.loss, problem.student.leaves)
    floor = FLOOR[problem.student.hidden.dtype]
    counts = torch.ones_like(exact.divergence) if problem.weights is None else (problem.weights != 0).double()
    loss = (exact.divergence * (1 if problem.weights is None else problem.weights))[counts != 0].sum()
    theirs = (baseline.divergence * (1 if problem.weights is None else problem.weights))[counts != 0].sum()
    assert_as_good(got.loss.detach(), theirs, loss, "loss", floor)
    for name in ("divergence", "entropy"):
        ours, plain, true = (getattr(one, name) for one in (got.scores, baseline, exact))
        assert ours.dtype == torch.float32 and not ours.requires_grad
        assert (ours[counts == 0] == 0).all()
        assert_as_good(ours, plain * counts, true * counts, name, floor)
    sure = (exact.is_same_top1 == baseline.is_same_top1) & (counts != 0)
    assert torch.equal(got.scores.is_same_top1[sure], exact.is_same_top1[sure].float())
    for name, ours, plain, true in zip("hwb", gradients, baseline.gradients, exact.gradients, strict=False):
        assert ours.dtype == problem.student.hidden.dtype
        assert_as_good(ours, 3 * plain.double(), 3 * true.double(), f"gradient of {name}", floor)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(serving, dtype, kind, beta):
    if serving == "triton" and dtype != torch.float32:
        pytest.skip("the interpreter is slow: float32 runs in it here, other dtypes in tests/kernels")
    check(make_divergence(7, 130, dtype=dtype, kind=kind, beta=beta, bias=True), serving)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_scale_cap_and_temperature_of_either_side(serving, kind, beta):
    check(make_divergence(5, 97, kind=kind, beta=beta, bias=True, transforms=True), serving)


@pytest.mark.parametrize("n, v", [(1, 1), (1, 300), (3, 2), (4, 2051)])
@pytest.mark.parametrize("kind, beta", KINDS[::2])
def test_shapes(serving, n, v, kind, beta):
    check(make_divergence(n, v, kind=kind, beta=beta, weights=n > 1), serving)


@pytest.mark.parametrize("beta", [0.0, 1e-4, 0.5, 1 - 1e-4, 1.0])
def test_every_beta(serving, beta):
    check(make_divergence(4, 60, beta=beta), serving)


def test_a_common_offset_of_10000(serving):
    check(make_divergence(4, 60, kind="jsd", beta=0.4, offset=1e4), serving)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_one_row_add_up(serving, dtype):
    problem = make_divergence(6, 80, dtype=dtype, bias=True)
    check(problem, serving, workspace_bytes=80 * (8 + 80))
    with pytest.raises(ValueError, match="hold no row of both heads' logits; a row takes"):
        problem.run(backend=serving, workspace_bytes=80)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind, beta", KINDS)
def test_likeliest_tokens(backend, kind, beta, tail, side):
    check(make_divergence(5, 70, kind=kind, beta=beta, bias=True, top_k=6, top_k_of=side, tail=tail), backend)


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("top_k", [1, 70])
def test_likeliest_tokens_of_capped_heads(backend, top_k, side):
    problem = make_divergence(5, 70, kind="jsd", beta=0.6, bias=True, transforms=True, top_k=top_k, top_k_of=side)
    check(problem, backend)


@pytest.mark.parametrize("tail", [True, False])
def test_tokens_that_the_student_rules_out_are_not_among_its_likeliest(backend, tail):
    """Two of its six tokens are left, so that four of top_k=6 are none."""
    problem = make_divergence(5, 6, beta=0.4, bias=True, top_k=6, top_k_of="student", tail=tail)
    problem.student.bias.data[[0, 2, 3, 5]] = -math.inf
    got = problem.run(backend=backend)
    logp_s, logp_t = problem.distributions(torch.float64)
    left = torch.tensor([1, 4])
    if tail:
        classes = [torch.cat([x[:, left], x[:, [0, 2, 3, 5]].logsumexp(1, keepdim=True)], 1) for x in (logp_s, logp_t)]
    else:
        classes = [x[:, left].log_softmax(1) for x in (logp_s, logp_t)]
    expected = row_divergences("jsd", 0.4, *classes).detach()
    counts = problem.weights != 0
    torch.testing.assert_close(got.scores.divergence, (expected * counts).float(), rtol=1e-5, atol=1e-7)
    wanted = torch.autograd.grad(
        (row_divergences("jsd", 0.4, *classes) * problem.weights).sum(), problem.student.hidden
    )
    assert_as_good(torch.autograd.grad(got.loss, problem.student.hidden)[0], *2 * wanted, "hidden", 1e-5)


def test_whose_likeliest_tokens_is_a_name_with_a_number():
    with pytest.raises(ValueError, match="top_k_of: unknown name 'both'; expected one of teacher, student"):
        make_divergence(3, 20, top_k=2, top_k_of="both").run()
    with pytest.raises(ValueError, match="top_k_of='student' needs top_k"):
        make_divergence(3, 20, top_k_of="student").run()


@pytest.mark.parametrize("top_k", [None, 5])
def test_columns_from_vocab_size_on_are_masked(serving, top_k):
    problem = make_divergence(5, 70, bias=True, vocab_size=61, top_k=top_k)
    if top_k is None:
        del problem.more["top_k"]
    t = problem.teacher
    wider = {"weight": torch.cat([t.weight, torch.full((9, 32), 1e9)]), "bias": torch.cat([t.bias, torch.ones(9)])}
    expected = problem.run(backend=serving).loss
    check(problem, serving)
    problem.teacher = replace(t, **wider)
    got = problem.run(backend=serving)
    assert torch.equal(got.loss, expected)
    grad_weight, grad_bias = torch.autograd.grad(got.loss, problem.student.leaves[1:])
    assert (grad_weight[61:] == 0).all() and (grad_bias[61:] == 0).all() and (grad_weight[:61] != 0).any()


def test_float64(backend):
    if backend != "torch":
        pytest.skip("kernels take no float64")
    problem = make_divergence(4, 50, dtype=torch.float64, transforms=True, bias=True)
    exact = problem.answer()
    got = problem.run()
    torch.testing.assert_close(got.scores.divergence, exact.divergence * (problem.weights != 0), rtol=1e-12, atol=0)
    for ours, true in zip(torch.autograd.grad(got.loss, problem.student.leaves), exact.gradients, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-14)


def test_rows_of_weight_zero_are_not_looked_at(serving):
    problem = make_divergence(5, 40, bias=True)
    expected = problem.run(backend=serving)
    wanted = torch.autograd.grad(expected.loss, problem.student.leaves)
    with torch.no_grad():
        problem.student.hidden[2] = math.nan
        problem.teacher.hidden[2] = math.inf
    got = problem.run(backend=serving)
    assert torch.equal(got.loss, expected.loss) and not got.scores.divergence[2]
    for one, other in zip(torch.autograd.grad(got.loss, problem.student.leaves), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("n", [0, 3])
def test_no_row_counts(serving, n):
    problem = make_divergence(n, 40, bias=True)
    problem.weights = torch.zeros(n)
    got = problem.run(backend=serving)
    assert got.loss == 0 and got.scores.entropy.shape == (n,) and not got.scores.entropy.any()
    for gradient, leaf in zip(
        torch.autograd.grad(got.loss, problem.student.leaves), problem.student.leaves, strict=True
    ):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight", "bias"}, {"hidden", "weight", "bias"}])
def test_frozen_parts(serving, frozen):
    problem = make_divergence(4, 40, bias=True)
    names = ("hidden", "weight", "bias")
    wanted = dict(zip(names, problem.answer(torch.float64).gradients, strict=True))
    for name in frozen:
        setattr(problem.student, name, getattr(problem.student, name).detach())
    got = problem.run(backend=serving)
    if frozen == set(names):
        assert not got.loss.requires_grad
        return
    left = [name for name in names if name not in frozen]
    for name, gradient in zip(
        left, torch.autograd.grad(got.loss, [getattr(problem.student, one) for one in left]), strict=True
    ):
        torch.testing.assert_close(gradient.double(), wanted[name].double(), rtol=1e-4, atol=1e-6)


def test_non_contiguous_inputs_and_no_gradient(serving):
    problem = make_divergence(4, 40)
    s, t = problem.student, problem.teacher
    strided = [torch.stack([x.detach(), torch.full_like(x, math.nan)], 1)[:, 0] for x in (s.hidden, t.hidden)]
    turned = [x.detach().t().contiguous().t() for x in (s.weight, t.weight)]
    expected = problem.run(backend=serving)
    with torch.no_grad():
        got = linear_divergence(
            strided[0], turned[0], strided[1], turned[1], **problem.arguments, outputs=EVERYTHING, backend=serving
        )
    torch.testing.assert_close(got.scores.divergence, expected.scores.divergence)
    torch.testing.assert_close(got.loss, expected.loss.detach())


def test_a_retained_graph_gives_the_same_again_and_second_derivatives_are_refused(serving):
    problem = make_divergence(4, 40)
    got = problem.run(backend=serving)
    first = torch.autograd.grad(got.loss, problem.student.leaves, retain_graph=True)
    second = torch.autograd.grad(got.loss, problem.student.leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="linear_divergence has no second derivative"):
        torch.autograd.grad(got.loss, problem.student.leaves, create_graph=True)


def test_no_gradient_reaches_the_teacher(serving):
    problem = make_divergence(4, 40, bias=True)
    got = problem.run(backend=serving)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(got.loss, problem.teacher.leaves)


def test_autocast_casts_hidden_states(serving):
    problem = make_divergence(5, 60)
    with torch.autocast("cpu", torch.bfloat16):
        got = problem.run(backend=serving)
    got.loss.backward()
    assert problem.student.hidden.grad.dtype == torch.float32 and got.loss.dtype == torch.float32
    exact = problem.answer(torch.float64)
    torch.testing.assert_close(problem.student.weight.grad, exact.gradients[1], rtol=0.1, atol=3e-3)


def test_heads_of_two_dtypes(serving):
    problem = make_divergence(5, 60)
    problem.teacher = make_divergence(5, 60, dtype=torch.bfloat16).teacher
    exact = problem.answer(torch.float64)
    got = problem.run(backend=serving)
    expected = (exact.divergence * (problem.weights != 0)).float()
    torch.testing.assert_close(got.scores.divergence, expected, rtol=2e-2, atol=0)


def test_small_divergences_do_not_cancel(serving):
    """A student beside its own teacher: PyTorch's terms cancel, and leave nothing of the sum."""
    for kind, beta in KINDS:
        problem = make_divergence(5, 500, kind=kind, beta=beta, weights=False)
        change = 1e-4 * torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
        problem.teacher = replace(problem.student, hidden=problem.student.hidden.detach() + change)
        exact = problem.answer(torch.float64)
        got = problem.run(backend=serving)
        worst = ((got.scores.divergence.double() - exact.divergence) / exact.divergence).abs().max()
        assert worst < 0.02, f"{kind}, {beta}: {worst}"
        assert (got.scores.divergence >= 0).all()


def test_compiled(serving):
    if serving == "triton":
        pytest.skip("the interpreter cannot be traced")
    problem = make_divergence(4, 40, bias=True)
    plain = problem.run(backend=serving)
    wanted = torch.autograd.grad(2 * plain.loss, problem.student.leaves)
    compiled = torch.compile(lambda: 2 * problem.run(backend=serving).loss, backend="aot_eager")
    loss = compiled()
    torch.testing.assert_close(loss.detach(), 2 * plain.loss.detach())
    for one, other in zip(torch.autograd.grad(loss, problem.student.leaves), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(serving, given):
    problem = make_divergence(4, 30, bias=True)
    s, t = problem.student, problem.teacher
    if given:
        logprobs, ids = problem.distributions(None)[1].topk(5, dim=1)
        teacher = (None, None, None, logprobs, ids)
    else:
        teacher = (t.hidden.detach(), t.weight.detach(), t.bias.detach(), None, None)
    numbers = ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.3, 0.7, 0.3, 0.0], 0, False, True, 30)
    args = (s.hidden, s.weight, s.bias, *teacher, problem.weights, *numbers, True, True, True, 1 << 20, serving)
    torch.library.opcheck(_linear_divergence, args)
