"""Kept logits of 16-bit weights, which the C++ backend packs: what that does to gradients, and when it is not done."""

from __future__ import annotations

import pytest
import torch

from support.heads import error, make_problem
from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from trl_fast.ops.device import DeviceFacts
from trl_fast.ops.head.kept_logits import KeptLogits
from trl_fast.ops.head.plan import LOGITS, RAW_BLOCKS, plan_head
from trl_fast.ops.head.row_kernels import ROW_KERNELS

pytestmark = pytest.mark.usefixtures("extension")

V = 5000


def plan_of(dtype=torch.bfloat16, fast=False, backend="cpp", keep=LOGITS, softcap=0.0):
    """The plan of 10⁶ rows under a head of some dtype on a CPU with or without fast products of bfloat16."""
    return plan_head(
        10**6,
        (V, 8),
        dtype=torch.bfloat16,
        weight_dtype=dtype,
        capped=softcap != 0.0,
        keep=keep,
        kernels=ROW_KERNELS[backend],
        workspace_bytes=1 << 24,
        facts=DeviceFacts("cpu", multiplies_bf16=fast),
    )


@pytest.mark.parametrize("start, stop", [(0, 10), (1, 10), (3, 10), (4, 9), (6, 10), (9, 40), (10, 10)])
def test_rows_move_to_the_front_also_where_they_reach_what_they_replace(start, stop):
    values, tops = torch.randn(2, 10, 4), torch.randn(2, 10, 1)
    wanted = values[:, start:stop].clone(), tops[:, start:stop].clone()
    KeptLogits(values, tops, columns=4, chunk=4).move(slice(start, stop))
    count = wanted[0].shape[1]
    torch.testing.assert_close((values[:, :count], tops[:, :count]), wanted, rtol=0, atol=0)


def test_twice_as_many_rows_fit():
    packed, raw = (plan_of(dtype).kept_rows for dtype in (torch.bfloat16, torch.float32))
    assert packed == pytest.approx(2 * raw, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.float32}, {"fast": True}, {"backend": "torch"}, {"softcap": 30.0}, {"keep": RAW_BLOCKS}],
    ids=["float32 weight", "16-bit logits", "no kernels", "softcap", "sparse gradient"],
)
def test_kept_as_they_are(options):
    assert plan_of().packed and not plan_of(**options).packed


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
    packed, unpacked = (
        torch.autograd.grad(loss(problem, {**options, "backend": backend}), problem.leaves)
        for backend in ("cpp", "torch")
    )
    for grad, other in zip(packed, unpacked, strict=True):
        assert error(grad, other) < 4e-3
    # What a token gets that is no target is made of probabilities alone.
    others = torch.ones(V, dtype=torch.bool).index_fill(0, problem.targets, False)
    assert error(packed[1][others], unpacked[1][others]) < 4e-3
    # A sure row's gradient is small beside the others': held to its own size.
    sizes = unpacked[0].float().norm(dim=1)
    active = sizes > 0
    assert sizes[::2].max() < 0.25 * sizes[1::2][active[1::2]].min() or temperature != 1.0
    assert ((packed[0] - unpacked[0]).float().norm(dim=1) <= 6e-3 * sizes).all()
