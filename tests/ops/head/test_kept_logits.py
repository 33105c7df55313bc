"""Kept logits of 16-bit weights, which the C++ backend packs: what that does to gradients, and when it is not done."""

from __future__ import annotations

import pytest
import torch

from support.heads import error, make_problem
from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.plan import Head

pytestmark = pytest.mark.usefixtures("extension")

V = 5000


def head_of(dtype=torch.bfloat16, product=torch.float32, backend="cpp", bias=None, **transform):
    weight = torch.zeros(V, 8, dtype=dtype)
    return Head(weight, bias, LogitTransform.of(**transform), product, backend, 1 << 24)


def test_twice_as_many_rows_fit():
    packed, wide = (head_of(dtype).kept_rows(10**6) for dtype in (torch.bfloat16, torch.float32))
    assert packed == pytest.approx(2 * wide, rel=0.01)
    assert head_of().kept_rows(10**6, raw=True) == wide


@pytest.mark.parametrize(
    "head",
    [
        lambda: head_of(torch.float32),
        lambda: head_of(product=torch.bfloat16),
        lambda: head_of(backend="torch"),
        lambda: head_of(softcap=30.0),
    ],
    ids=["float32 weight", "16-bit logits", "no kernels", "softcap"],
)
def test_kept_as_they_are(head):
    assert head_of().packs and not head().packs


def confident_problem():
    """Half the rows give their target 99.9% of the probability or more; p - 1 is what their gradient is made of."""
    problem = make_problem(24, V, 64, dtype=torch.bfloat16, spread=0.1)
    with torch.no_grad():
        rows = problem.weight[problem.targets].float()
        problem.hidden[::2] += (16 * rows / rows.square().sum(1, keepdim=True))[::2]
    return problem


def logprob_loss(problem, options):
    return -linear_logprob(problem.hidden, problem.weight, problem.targets, **options).logprobs.sum()


def masked_loss(problem, options):
    """Every third row takes no part in backward, so that rows of kept logits are picked by number."""
    logprobs = linear_logprob(problem.hidden, problem.weight, problem.targets, **options).logprobs
    return -logprobs[torch.arange(len(logprobs)) % 3 > 0].sum()


def entropy_loss(problem, options):
    given = (problem.hidden, problem.weight, problem.targets)
    scores = linear_logprob(*given, outputs=("logprobs", "entropy"), **options)
    return (scores.entropy - scores.logprobs).sum()


def cross_entropy(problem, options):
    return linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum", **options)


def token_loss(problem, options):
    given = (problem.hidden, problem.weight, problem.targets, lambda scores, _: -scores.logprobs.sum())
    return linear_token_loss(*given, **options).loss


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("loss", [logprob_loss, masked_loss, entropy_loss, cross_entropy, token_loss])
@pytest.mark.parametrize("workspace_bytes", [None, 150_000])
def test_gradients_are_as_good_as_their_dtype(loss, workspace_bytes, temperature):
    """Nearly as good as from float32 logits, whose gradients are rounded to bfloat16 at the end: row by row."""
    problem = confident_problem()
    options = {"workspace_bytes": workspace_bytes, "temperature": temperature}
    packed, wide = (
        torch.autograd.grad(loss(problem, {**options, "backend": backend}), problem.leaves)
        for backend in ("cpp", "torch")
    )
    for grad, other in zip(packed, wide, strict=True):
        assert error(grad, other) < 4e-3
    # What a token gets that is no target is made of probabilities alone.
    others = torch.ones(V, dtype=torch.bool).index_fill(0, problem.targets, False)
    assert error(packed[1][others], wide[1][others]) < 4e-3
    # A sure row's gradient is small beside the others': held to its own size.
    sizes = wide[0].float().norm(dim=1)
    active = sizes > 0
    assert sizes[::2].max() < 0.25 * sizes[1::2][active[1::2]].min() or temperature != 1.0
    assert ((packed[0] - wide[0]).float().norm(dim=1) <= 6e-3 * sizes).all()
