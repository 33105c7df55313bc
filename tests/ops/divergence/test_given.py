"""linear_divergence_to_given: a teacher of whom some tokens' log-probabilities are known."""

from __future__ import annotations

import math

import pytest
import torch

from support.divergences import EVERYTHING, KINDS, make_divergence, row_divergences
from support.heads import FLOOR, assert_as_good
from trl_fast.ops import linear_divergence, linear_divergence_to_given
from trl_fast.ops.backends import load_extension

N, V, K = 5, 60, 6


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if request.param == "cpp" and not load_extension().ok:
        pytest.skip(load_extension().reason)
    return request.param


def given(problem, padded=False):
    """The teacher's likeliest tokens as they are given, in any order; with `padded`, the third row has two fewer."""
    logprobs, ids = problem.distributions(torch.float64)[1].topk(K)
    logprobs, ids = logprobs.float().flip(1), ids.flip(1)
    if padded:
        logprobs[1, 3:5], ids[1, 3:5] = -math.inf, 10**6
    return logprobs, ids


def run(problem, logprobs, ids, **named):
    s = problem.student
    more = {"weights": problem.weights, "kind": problem.kind, "beta": problem.beta, "bias": s.bias, **s.transform}
    return linear_divergence_to_given(s.hidden, s.weight, logprobs, ids, **{**more, **named})


def answer(problem, logprobs, ids, tail, dtype):
    """Divergences (N,) and gradients, row by row, of the known tokens and the sum of the others."""
    logp_s, _ = problem.distributions(dtype)
    rows = []
    for s, t, tokens in zip(logp_s, logprobs.to(logp_s.dtype), ids, strict=True):
        known = t > -math.inf
        p, q = s[tokens[known]], t[known]
        if tail:
            others = torch.ones_like(s, dtype=torch.bool).scatter(0, tokens[known], False)
            p = torch.cat([p, s[others].logsumexp(0)[None]])
            q = torch.cat([q, torch.log1p(-q.exp().sum())[None]])
        rows.append(row_divergences(problem.kind, problem.beta, p.log_softmax(-1), q.log_softmax(-1)))
    divergence = torch.stack(rows)
    loss = (divergence * problem.weights)[problem.weights != 0].sum()
    return divergence.detach(), torch.autograd.grad(loss, problem.student.leaves)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("transforms", [False, True])
def test_all_tokens_have_no_tail(backend, kind, beta, transforms):
    """They leave rounding of 1, and a cap leaves rounding of the others: a KL to that would be infinite."""
    problem = make_divergence(33, 257, kind=kind, beta=beta, transforms=transforms)
    logprobs, ids = problem.distributions(torch.float64)[1].topk(257)
    likeliest = make_divergence(33, 257, kind=kind, beta=beta, transforms=transforms, top_k=257)
    expected = problem.run(backend=backend)
    for got in (run(problem, logprobs, ids, backend=backend), likeliest.run(backend=backend)):
        torch.testing.assert_close(got.scores.divergence, expected.scores.divergence, rtol=1e-4, atol=1e-6)


def test_entropy_with_a_large_offset():
    """A logit of 1e4 has a rounding of 2e-12 in float64, and so have probabilities."""
    problem = make_divergence(N, V, dtype=torch.float64, bias=True, offset=1e4, weights=False, top_k=4)
    entropy = problem.run(backend="torch").scores.entropy
    torch.testing.assert_close(entropy, problem.answer().entropy, rtol=1e-10, atol=0)


def test_all_likeliest_tokens_of_a_capped_head_have_no_tail(backend):
    """A cap leaves the known tokens, which are ruled out, something that is subtracted."""
    generator = torch.Generator().manual_seed(0)
    weight, teacher, teacher_weight = (
        torch.randn(*shape, generator=generator) for shape in ((257, 8), (9, 1), (257, 1))
    )
    given = (torch.zeros(9, 8), weight, teacher, teacher_weight)
    named = {"beta": 1.0, "softcap": 2.0, "temperature": 0.3, "backend": backend}
    whole, known = (linear_divergence(*given, **named, **more).loss for more in ({}, {"top_k": 257}))
    torch.testing.assert_close(known, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("transforms", [False, True])
def test_value_and_gradients(backend, kind, beta, tail, transforms):
    problem = make_divergence(N, V, kind=kind, beta=beta, bias=True, transforms=transforms)
    tokens = given(problem, padded=True)
    got = run(problem, *tokens, tail=tail, outputs=EVERYTHING, backend=backend)
    baseline, exact = (answer(problem, *tokens, tail, dtype) for dtype in (None, torch.float64))
    counts = problem.weights != 0
    assert_as_good(got.scores.divergence, baseline[0] * counts, exact[0] * counts, "divergence", FLOOR[torch.float32])
    for ours, plain, true in zip(
        torch.autograd.grad(got.loss, problem.student.leaves), baseline[1], exact[1], strict=True
    ):
        assert_as_good(ours, plain, true, "gradient", FLOOR[torch.float32])
    whole = problem.run(backend="torch").scores
    torch.testing.assert_close(got.scores.entropy, whole.entropy)
    torch.testing.assert_close(got.scores.is_same_top1, whole.is_same_top1)


def test_the_likeliest_tokens_of_a_head_are_the_same_given(backend):
    problem = make_divergence(N, V, kind="jsd", beta=0.4, bias=True)
    logprobs, ids = given(problem)
    one = run(problem, logprobs, ids, backend=backend)
    problem.more["top_k"] = K
    other = problem.run(backend=backend)
    torch.testing.assert_close(one.loss, other.loss)
    for ours, theirs in zip(*(torch.autograd.grad(x.loss, problem.student.leaves) for x in (one, other)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_every_token_given_is_the_whole_divergence(backend):
    problem = make_divergence(N, V, kind="jsd", beta=0.7, bias=True, weights=False)
    logprobs = problem.distributions(None)[1]
    ids = torch.arange(V).expand(N, V)
    problem.weights = torch.ones(N)
    torch.testing.assert_close(run(problem, logprobs, ids, backend=backend).loss, problem.run(backend=backend).loss)


def test_a_tail_that_the_student_hardly_has_keeps_its_gradient(backend):
    """1 minus what a sure student has of the known tokens is nothing in float32; the sum of the others is not."""
    hidden = torch.zeros(1, 1)
    bias = torch.zeros(40)
    bias[3] = 25.0
    bias.requires_grad_()
    logprobs, ids = torch.tensor([[0.9]]).log(), torch.tensor([[3]])
    named = {"beta": 0.0, "bias": bias, "backend": backend}
    loss = linear_divergence_to_given(hidden, torch.zeros(40, 1), logprobs, ids, **named).loss
    (gradient,) = torch.autograd.grad(loss, bias)
    # s − t, the tail's t being dealt as s is.
    expected = torch.full((40,), -0.1 / 39)
    expected[3] = 0.1
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_as_trls_server_distillation(backend, beta, tail):
    """Its loss of a teacher's log-probabilities, with a tail and without."""
    from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence

    problem = make_divergence(N, V, kind="jsd", beta=beta, weights=False)
    problem.weights = torch.ones(N)
    logprobs, ids = given(problem)
    logp_s = problem.distributions(None)[0].gather(1, ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if tail:
        (student, support), (teacher, _) = (_add_tail_bucket(logp, mask) for logp in (logp_s, logprobs))
    else:
        support, (student, teacher) = mask, (logp.log_softmax(-1) for logp in (logp_s, logprobs))
    theirs = _jsd_divergence(student, teacher, beta, support).sum()
    ours = run(problem, logprobs, ids, tail=tail, backend=backend).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for one, other in zip(*(torch.autograd.grad(x, problem.student.leaves) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_as_trls_own_kernel(backend, beta):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    problem = make_divergence(N, V, kind="jsd", beta=beta, bias=True, transforms=True, weights=False)
    s, t = problem.student, problem.teacher
    teacher = (t.hidden.detach(), t.weight.detach(), t.bias.detach())
    transforms = (s.temperature, s.logit_scale, s.softcap, t.logit_scale, t.softcap)
    divergence, entropy = ChunkedDivergenceFunction.apply(s.hidden, s.weight, s.bias, *teacher, beta, *transforms)
    got = problem.run(backend=backend)
    torch.testing.assert_close(got.scores.divergence, divergence.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.scores.entropy, entropy, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(divergence.sum(), s.leaves)
    for one, other in zip(torch.autograd.grad(got.loss, s.leaves), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_half_precision_and_rows_left_out(backend):
    problem = make_divergence(N, V, dtype=torch.bfloat16, kind="jsd", beta=0.3)
    logprobs, ids = given(problem)
    logprobs[N // 2], ids[N // 2] = -math.inf, -1
    got = run(problem, logprobs.bfloat16(), ids.int(), backend=backend)
    assert got.loss.isfinite() and not got.scores.divergence[N // 2]
    gradient = torch.autograd.grad(got.loss, problem.student.hidden)[0]
    assert gradient.dtype == torch.bfloat16 and not gradient[N // 2].any() and gradient.isfinite().all()


WRONG = {
    "teacher_ids, teacher_logprobs: row 1 has a token outside the vocabulary": lambda p, i: i[1].fill_(V),
    "row 0 has a token twice": lambda p, i: i[0, 0].copy_(i[0, 1]),
    "row 3 has no token; give it weight 0": lambda p, i: p[3].fill_(-math.inf),
    "row 2 has probabilities of more than 1 in all, or NaN: are these logits": lambda p, i: p[2].fill_(0.5),
    "row 4 has probabilities of more than 1 in all, or NaN": lambda p, i: p[4].fill_(math.nan),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_rows_are_named(message):
    problem = make_divergence(N, V, weights=False)
    logprobs, ids = given(problem)
    WRONG[message](logprobs, ids)
    with pytest.raises(ValueError, match=message):
        run(problem, logprobs, ids)
    row = int(message.partition("row ")[2][0])
    run(problem, logprobs, ids, weights=(torch.arange(N) != row).float())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": torch.zeros(N + 1, K)}, r"teacher_logprobs: expected shape \(5, K\)"),
        ({"logprobs": torch.zeros(N, K).long()}, "teacher_logprobs: expected a floating-point dtype"),
        ({"ids": torch.zeros(N, K - 1).long()}, r"teacher_ids: expected shape \(5, 6\)"),
        ({"ids": torch.zeros(N, K)}, "teacher_ids: expected an integer dtype"),
    ],
)
def test_wrong_tensors_are_named(change, message):
    problem = make_divergence(N, V, weights=False)
    logprobs, ids = given(problem)
    with pytest.raises(ValueError, match=message):
        run(problem, **{"logprobs": logprobs, "ids": ids, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "kl"}, "kind: unknown divergence 'kl'; expected one of jsd"),
        ({"beta": 1.5}, r"beta must lie in \[0, 1\], got 1.5"),
        ({"beta": math.nan}, "beta must lie in"),
        ({"kind": "skewed_forward_kl", "beta": 1.0}, "beta=1 makes skewed_forward_kl zero"),
        ({"top_k": 61}, "top_k: expected 1 to the 60 tokens that count, got 61"),
        ({"top_k": 0}, "top_k: expected 1 to"),
        ({"top_k": 2.0}, "top_k: expected 1 to .*, got 2.0"),
        ({"top_k": True}, "top_k: expected 1 to .*, got True"),
        ({"vocab_size": 2.0}, "vocab_size: expected 1 to .*, got 2.0"),
        ({"beta": None}, "beta must lie in .*, got None"),
        ({"vocab_size": 61}, "vocab_size: expected 1 to the 60 columns"),
        ({"weights": torch.ones(N + 1)}, r"weights: expected shape \(5,\)"),
        ({"weights": torch.ones(N).long()}, "weights: expected a floating-point dtype"),
        ({"weights": torch.ones(N, requires_grad=True)}, "weights: they have no gradient here"),
        ({"outputs": ("logprobs",)}, "outputs: unknown name 'logprobs'"),
        ({"logit_scale": 0.0}, "logit_scale: 0 makes every token equally likely"),
        ({"teacher_softcap": -1.0}, "softcap must be a positive"),
        ({"teacher_bias": torch.ones(3)}, "teacher_bias: expected"),
        ({"backend": "cudnn"}, "backend: unknown name 'cudnn'"),
    ],
)
def test_wrong_options_are_named(change, message):
    problem = make_divergence(N, V)
    s, t = problem.student, problem.teacher
    with pytest.raises(ValueError, match=message):
        linear_divergence(s.hidden, s.weight, t.hidden, t.weight, **change)


@pytest.mark.parametrize(
    "place, tensor, message",
    [
        (2, torch.zeros(N + 1, 32), "teacher_hidden: expected 5 rows as hidden has, got 6"),
        (2, torch.zeros(N, 31), r"teacher_weight: expected shape \(V, 31\)"),
        (
            3,
            torch.zeros(V + 4, 32),
            "has 64 columns, the student's 60; if both have one tokenizer, give its size",
        ),
        (3, torch.zeros(V, 32).half(), "teacher_weight: expected torch.float32 as teacher_hidden has"),
        (1, torch.zeros(V, 24).long(), "weight: expected a floating-point dtype"),
    ],
)
def test_wrong_heads_are_named(place, tensor, message):
    problem = make_divergence(N, V)
    s, t = problem.student, problem.teacher
    heads = [s.hidden, s.weight, t.hidden, t.weight]
    heads[place] = tensor
    with pytest.raises(ValueError, match=message):
        linear_divergence(*heads)


def test_hidden_states_that_are_not_finite_are_named_on_request(monkeypatch):
    problem = make_divergence(N, V, weights=False)
    problem.teacher.hidden.data[3] = math.nan
    assert problem.run().loss.isnan()
    monkeypatch.setenv("TRL_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="teacher_hidden: 1 of 5 rows are not finite"):
        problem.run()
