"""The gradient of a head that processes hold in parts is the mean over processes of their whole gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from support.heads import make_problem
from support.ranks import run_on_ranks
from trl_fast.ops.head import plan, transient_weight
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.plan import HeadOptions
from trl_fast.ops.head.weight_shard import WeightShard
from trl_fast.ops.linear_logprob import token_logprobs
from trl_fast.ops.linear_token_loss import token_loss_of_head

# Rows of the processes: not the same number, and one without any.
NUM_ROWS = (9, 0, 30, 4)
# So that all have rows, one has fewer, one has none, and a tile or a piece ends amid the rows of a process.
VOCABULARIES = (1300, 1301, 5)


def loss_of(problem, weight, shard, kind):
    options = HeadOptions(workspace_bytes=8 * 4 * 1301)
    tensors = (problem.hidden, weight, problem.targets, problem.bias)
    given = (*tensors, LogitTransform.of(**problem.transform), ("logprobs", "entropy"), options)
    if kind == "scores":
        tokens = token_logprobs(*given, source=shard)
        return (-tokens.logprobs + 0.1 * tokens.entropy).sum()
    groups = (len(problem.hidden),) if kind == "groups" else None
    return token_loss_of_head(
        *given, lambda scores, rows: (-scores.logprobs).sigmoid().sum(), groups, source=shard
    ).loss


def gradients(problem, weight, kind):
    leaves = [problem.hidden, weight, problem.bias]
    return torch.autograd.grad(loss_of(problem, weight, None, kind), leaves)


def compare(replicated: bool) -> list[str]:
    """Returns where the gradients of this rank's rows are not the mean over ranks of the whole ones."""
    dist.init_process_group("gloo")
    # Tiles and pieces that are much smaller than the vocabulary.
    plan._MIN_TILE_COLUMNS, plan.CPU_TILES = 64, plan.CPU_TILES._replace(weight_bytes=200 * 24 * 4)
    transient_weight.PIECE_BYTES = 130 * 24 * 4
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group, replicas, size = dist.group.WORLD, None, ranks
    if replicated:
        groups = [dist.new_group(pair) for pair in ([0, 1], [2, 3], [0, 2], [1, 3])]
        group, replicas, size = groups[rank // 2], groups[2 + rank % 2], 2
    wrong = []
    for vocabulary in VOCABULARIES:
        weight = make_problem(1, vocabulary).weight.detach()
        problems = [make_problem(n, vocabulary, bias=True, seed=seed, softcap=9.0) for seed, n in enumerate(NUM_ROWS)]
        for kind in ("scores", "tokens", "groups"):
            whole = [gradients(problem, weight.clone().requires_grad_(), kind) for problem in problems]
            expected = torch.stack([each[1] for each in whole]).mean(0)
            for part in (deal(expected, size, dist.get_rank(group)) for deal in (rows_of, numbers_of)):
                held = torch.zeros_like(part.expected).requires_grad_()
                each = part.numbers_each
                shard = WeightShard(lambda weight=weight: weight, held, weight.shape, each, group, replicas)
                loss = loss_of(problems[rank], weight, shard, kind)
                found = torch.autograd.grad(loss, [problems[rank].hidden, held, problems[rank].bias])
                pairs = zip(found, (whole[rank][0], part.expected, whole[rank][2]), strict=True)
                for name, (one, other) in zip(("hidden", "weight", "bias"), pairs, strict=True):
                    if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-5, atol=1e-6):
                        wrong.append(f"{vocabulary} {kind} {name}: {(one - other).abs().max()}")
    return wrong


class Part(NamedTuple):
    """The gradient that a rank is to get, and how many numbers a rank holds."""

    expected: torch.Tensor
    numbers_each: int


def rows_of(gradient: torch.Tensor, size: int, rank: int) -> Part:
    """The rows of a rank, as FSDP2 deals them."""
    each = -(-len(gradient) // size)
    return Part(gradient[min(rank * each, len(gradient)) : (rank + 1) * each], each * gradient.shape[1])


def numbers_of(gradient: torch.Tensor, size: int, rank: int) -> Part:
    """The numbers of a rank, as ZeRO-3 deals them: they begin and end amid a row, and the last ones are filled up."""
    each = -(-gradient.numel() // size)
    filled = torch.cat([gradient.flatten(), gradient.new_zeros(each * size - gradient.numel())])
    return Part(filled[rank * each : (rank + 1) * each], each)


def test_rows_get_the_mean_over_processes_of_their_gradients():
    assert run_on_ranks(compare, False, ranks=4, engine=None) == [[]] * 4


def test_processes_that_hold_the_same_rows_are_averaged_too():
    assert run_on_ranks(compare, True, ranks=4, engine=None) == [[]] * 4
