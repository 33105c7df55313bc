"""A head with adapters gives their factors the gradients that autograd finds through the whole sum."""

from __future__ import annotations

import torch

from support.heads import make_problem
from trl_fast.ops.head import plan, transient_weight
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.low_rank_weight import LowRankFactors, LowRankWeight
from trl_fast.ops.head.plan import HeadOptions
from trl_fast.ops.linear_logprob import token_logprobs

VOCABULARY, WIDTH, RANKS = 1301, 24, (3, 5)


def factors(rank: int) -> LowRankFactors:
    return LowRankFactors(
        torch.randn(rank, WIDTH).requires_grad_(), torch.randn(VOCABULARY, rank).mul_(0.1).requires_grad_(), 0.7
    )


def test_factors_get_their_gradients_tile_by_tile(monkeypatch):
    monkeypatch.setattr(plan, "_MIN_TILE_COLUMNS", 64)
    monkeypatch.setattr(plan, "CPU_TILES", plan.CPU_TILES._replace(weight_bytes=200 * WIDTH * 4))
    monkeypatch.setattr(transient_weight, "PIECE_BYTES", 130 * WIDTH * 4)
    problem = make_problem(30, VOCABULARY, bias=True, softcap=9.0)
    adapted = LowRankWeight(problem.weight.detach(), [factors(rank) for rank in RANKS])
    leaves = [problem.hidden, problem.bias, *adapted.parameters]

    def gradients(weight, source):
        options = HeadOptions(workspace_bytes=8 * 4 * VOCABULARY)
        tensors = (problem.hidden, weight, problem.targets, problem.bias)
        given = (*tensors, LogitTransform.of(**problem.transform), ("logprobs", "entropy"), options)
        tokens = token_logprobs(*given, source=source)
        return torch.autograd.grad((-tokens.logprobs + 0.1 * tokens.entropy).sum(), leaves)

    expected = gradients(adapted.whole(), None)
    with torch.no_grad():
        whole = adapted.whole()
    for one, other in zip(gradients(whole, adapted), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
