"""The sampler of online methods, row by row equal to TRL's."""

import pytest
from trl.trainer.utils import RepeatSampler as TRLRepeatSampler

from trl_fast.data.repeat_sampler import RepeatSampler

SETTINGS = [
    {"mini_repeat_count": 1},
    {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 4, "seed": 42},
    {"mini_repeat_count": 3, "batch_size": 4, "repeat_count": 1, "seed": 7},
    {"mini_repeat_count": 2, "batch_size": 5, "repeat_count": 2, "shuffle": False},
    {"mini_repeat_count": 8, "batch_size": 13, "repeat_count": 3, "seed": 0},
    {"mini_repeat_count": 4, "batch_size": 6},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_trl(settings):
    ours, theirs = RepeatSampler(range(13), **settings), TRLRepeatSampler(range(13), **settings)
    assert len(ours) == len(theirs)
    for _ in range(3):
        order = list(ours)
        assert order == list(theirs)
        assert len(order) == len(ours)


def test_each_pass_has_its_own_order():
    sampler = RepeatSampler(range(50), 1, seed=1)
    assert list(sampler) != list(sampler)


def test_the_order_of_an_epoch_does_not_depend_on_those_before_it():
    settings = {"mini_repeat_count": 2, "batch_size": 3, "repeat_count": 2, "seed": 5}
    sampler, theirs = RepeatSampler(range(13), **settings), TRLRepeatSampler(range(13), **settings)
    orders = [list(theirs) for _ in range(4)]
    for epoch in (2, 0, 3, 3, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == orders[epoch]
    assert list(sampler) == orders[2]


def test_fewer_rows_than_one_generation():
    with pytest.raises(ValueError, match="the dataset has 3 rows, but one generation takes 4 different prompts"):
        RepeatSampler(range(3), 2, batch_size=4)


@pytest.mark.parametrize("name", ["mini_repeat_count", "batch_size", "repeat_count"])
def test_counts_below_one(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        RepeatSampler(range(3), **{"mini_repeat_count": 1, name: 0})
