"""Rows whose tokens several processes share are scored as by one, for every kind of loss."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

import trl_fast.data.packing as packing
from support.models import tiny_model
from support.ranks import run_on_ranks
from trl_fast.data.token_trees import Tree
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.modeling.segment_attention import use_segment_attention
from trl_fast.modeling.ulysses import SequenceGroup, deal_groups, sharing_rows

PAIRS = 5
KINDS = ("pairs", "tokens", "scores")
# Windows and sinks: a process has those of its heads.
WINDOWED = {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "sizes, parts, bounds",
    [
        ((1,) * 10, 2, [0, 5, 10]),
        ((1,) * 10, 3, [0, 3, 7, 10]),
        ((4, 4, 4), 2, [0, 4, 12]),
        ((9, 1, 1), 2, [0, 9, 11]),
        ((9, 1), 3, [0, 0, 9, 10]),
        ((7,), 2, [0, 0, 7]),
        ((), 2, [0, 0, 0]),
    ],
)
def test_groups_are_dealt_whole(sizes, parts, bounds):
    assert deal_groups(sizes, parts) == bounds


def batch_of(layout):
    generator = torch.Generator().manual_seed(1)
    ids = lambda count: torch.randint(3, 300, (count,), generator=generator).tolist()  # noqa: E731
    trees = [Tree(ids(9 + 2 * i), [ids(5 + i), ids(8 - i)]) for i in range(PAIRS)]
    return packing.pack_trees(trees, layout, 0)


def losses(group=None):
    """Loss, scores and gradients of each kind in each layout."""
    found = []
    for family, layout, kinds, changes in (
        ("llama", "packed", KINDS, {}),
        ("qwen3", "shared_prefix", KINDS, {}),
        ("gpt_oss", "shared_prefix", KINDS[:1], WINDOWED),
    ):
        batch = batch_of(layout)
        weights = torch.linspace(-1, 2, len(batch.targets))
        for kind in kinds:
            model = tiny_model(family, **changes)
            attach_scoring(model)
            use_segment_attention(model)
            with sharing_rows(group):
                loss, scores = loss_of(kind, model, batch, weights)
                loss.backward()
            gradients = {name: weight.grad for name, weight in model.named_parameters()}
            found.append((loss.detach(), scores.logprobs.detach(), gradients))
    return found


def loss_of(kind, model, batch, weights):
    def pairs(scores, rows):
        sums = torch.zeros(2 * PAIRS).index_add(0, batch.branch[rows], scores.logprobs)
        there = (batch.branch[rows] // 2).unique()
        return -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2]))[there].sum()

    if kind == "scores":
        scores = score(model, batch, outputs=("logprobs", "entropy", "is_top1")).tokens
        assert scores.is_top1.dtype == torch.bool
        return (scores.logprobs.sort().values * weights).sum() + scores.entropy.square().mean(), scores
    if kind == "pairs":
        found = score(model, batch, token_loss=pairs, group_sizes=batch.group_sizes)
    else:
        found = score(model, batch, token_loss=lambda scores, rows: (weights[rows] * scores.logprobs).sum())
    return found.loss, found.tokens


def shared():
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.group.WORLD
    return losses(SequenceGroup(world, torch.distributed.get_rank(), world.size()))


# With four processes each has a copy of one of the two key-value heads.
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_rows_score_as_one(processes, monkeypatch):
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 1)
    ranks = run_on_ranks(shared, ranks=processes, engine=None)
    for one, *found in zip(losses(), *ranks, strict=True):
        loss, logprobs, gradients = one
        for rank in found:
            torch.testing.assert_close(rank[0], loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(rank[1], logprobs, rtol=1e-6, atol=1e-6)
        for name, expected in gradients.items():
            mean = torch.stack([rank[2][name] for rank in found]).mean(0)
            assert (mean - expected).norm() < 3e-6 * expected.norm(), name
