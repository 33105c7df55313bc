"""Rows dealt by their cost: a step keeps its rows, whatever accelerate does with batches, and never takes longer."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from trl_fast.data.balanced_batches import BalancedBatches, CostModel, TreeSizes, deal, step_time, tree_sizes

# Processes, rows of each in a micro-batch, micro-batches of a step.
SHAPES = [*product((2, 3, 8), (1, 2, 4), (1, 3))]
FEW_SHAPES = [(2, 1, 3), (3, 2, 2), (4, 2, 1)]


def random_costs(count, seed):
    return np.random.default_rng(seed).lognormal(6, 1, count).astype(np.int64)


def times(order, costs, ranks, rows):
    return step_time(costs[order].reshape(-1, ranks, rows).sum(axis=2))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("ranks", "rows", "steps"), SHAPES)
def test_a_deal_is_never_worse_than_the_rows_own_order(ranks, rows, steps, across):
    gains = []
    for seed in range(30):
        costs = random_costs(ranks * rows * steps, seed)
        order = deal(costs, ranks, rows, across_micro_batches=across)
        assert sorted(order) == [*range(len(costs))]
        if not across:
            assert all(sorted(part) == [*part.min() + np.arange(ranks * rows)] for part in order.reshape(steps, -1))
        after, before = times(order, costs, ranks, rows), times(np.arange(len(costs)), costs, ranks, rows)
        assert after.waits_often <= before.waits_often and after.waits_once <= before.waits_once
        gains.append(before.waits_often / after.waits_often)
    # With a row for each process at a time there is nothing to deal, unless rows may change the micro-batch.
    assert (np.mean(gains) > 1.1) == (rows > 1 or (across and steps > 1))


def test_rows_of_like_cost_are_computed_at_the_same_time():
    costs = np.array([9, 1, 8, 2, 7, 3, 1, 9])
    assert costs[deal(costs, 2, 1, across_micro_batches=True)].tolist() == [9, 9, 8, 7, 2, 3, 1, 1]


def test_a_process_that_had_more_to_do_gets_less_in_the_next_micro_batch():
    costs = np.array([5, 1, 5, 1])
    assert costs[deal(costs, 2, 1, across_micro_batches=False)].tolist() == [5, 1, 1, 5]


def epoch(count, ranks, rows, steps, *, balance, across=True, first_epoch=0, even=True, split=False, drop_last=False):
    """The rows of each micro-batch of each rank, as accelerate deals them."""
    found = []
    for rank in range(ranks):
        sampler = SeedableRandomSampler(range(count), data_seed=3)
        sampler.set_epoch(first_epoch)
        batches = BatchSampler(sampler, rows * ranks if split else rows, drop_last)
        shard = BatchSamplerShard(batches, ranks, rank, split_batches=split, even_batches=even)
        if balance:
            settings = {"across_micro_batches": across, "fills": even, "split": split}
            shard.batch_sampler = BalancedBatches(batches, random_costs(count, 1), ranks, steps, **settings)
        found.append([*shard])
        assert len([*shard.batch_sampler]) == len(shard.batch_sampler)
        # What accelerate tells of uneven parts of batches is another number.
        assert len(shard) == len(found[-1]) or (split and not even)
    return found


def rows_of_windows(dealt, width):
    """The rows of each `width` micro-batches of all ranks together, as often as they come."""
    most = max(map(len, dealt))
    return [
        sorted(row for rank in dealt for batch in rank[start : start + width] for row in batch)
        for start in range(0, most, width)
    ]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("even", "split", "drop_last"), [*product((True, False), (False, True), (False, True))])
def test_every_step_has_the_rows_that_it_has_without(even, split, drop_last, across):
    changed = 0
    settings = {"even": even, "split": split, "drop_last": drop_last}
    for count, (ranks, rows, steps), number in product((3, 24, 49), FEW_SHAPES, (0, 5)):
        shape = count, ranks, rows, steps
        plain = epoch(*shape, balance=False, first_epoch=number, **settings)
        dealt = epoch(*shape, balance=True, across=across, first_epoch=number, **settings)
        width = steps if across else 1
        assert rows_of_windows(dealt, width) == rows_of_windows(plain, width)
        sizes = [[[*map(len, rank)] for rank in found] for found in (plain, dealt)]
        assert sizes[0] == sizes[1]
        changed += dealt != plain
    assert changed > 5


def test_the_order_is_that_of_the_epoch():
    first, again, next_epoch = (epoch(48, 2, 2, 2, balance=True, first_epoch=number) for number in (0, 0, 1))
    assert first == again != next_epoch


def test_sizes_count_a_shared_prompt_once():
    prompts, branches = np.array([4, 0]), np.array([[2, 3], [5, 0]])
    once = tree_sizes(prompts, branches, shares_prompts=True)
    assert once.tokens.tolist() == [9, 5]
    # 4² + (2² + 2·2·4) + (3² + 2·3·4), halved.
    assert once.pairs.tolist() == [34.5, 12.5]
    twice = tree_sizes(prompts, branches, shares_prompts=False)
    assert twice.tokens.tolist() == [13, 5] and twice.pairs.tolist() == [(6**2 + 7**2) / 2, 12.5]
    assert once.scored.tolist() == twice.scored.tolist() == [5, 5]


def test_costs_follow_the_models_shape():
    shape = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 10}
    model = CostModel.of_config(SimpleNamespace(**shape, intermediate_size=16), has_head=True)
    # Four square projections and three of the MLP, two operations a weight; scores and values of each pair.
    assert model == CostModel(token=3 * 2 * (4 * 64 + 3 * 8 * 16), pair=3 * 4 * 8, scored=2 * 8 * 10)
    experts = SimpleNamespace(**shape, moe_intermediate_size=4, num_experts_per_tok=4, num_key_value_heads=1)
    # Keys and values of one head of two numbers.
    assert CostModel.of_config(experts, has_head=False).token == 3 * 2 * (2 * 64 + 2 * 16 + 3 * 8 * 16)
    sizes = TreeSizes(np.array([10.0]), np.array([50.0]), np.array([4.0]))
    assert CostModel(token=4, pair=2, scored=1).costs(sizes).tolist() == [(40 + 100 + 4) / 4]
