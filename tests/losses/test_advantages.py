"""Advantages and importance ratios against numbers worked out group by group."""

import math
import statistics

import pytest
import torch

from trl_fast.losses.advantages import group_advantages, leave_one_out_advantages, nan_std
from trl_fast.losses.importance_sampling import importance_ratios

NAN = math.nan
ONE = torch.ones(1)


def column(*values):
    return torch.tensor(values).view(-1, 1)


def test_a_group_is_centred_and_scaled():
    found = group_advantages(column(1.0, 2.0, 6.0, 5.0, 5.0, 5.0), ONE, 3)
    spread = statistics.stdev([1, 2, 6]) + 1e-4
    expected = [-2 / spread, -1 / spread, 3 / spread, 0, 0, 0]
    torch.testing.assert_close(found.advantages, torch.tensor(expected))
    assert found.is_flat.tolist() == [False] * 3 + [True] * 3
    torch.testing.assert_close(
        group_advantages(column(1.0, 2.0, 6.0), ONE, 3, scale_rewards="none").advantages,
        torch.tensor([-2.0, -1.0, 3.0]),
    )


def test_what_has_no_reward_is_no_part_of_the_mean():
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 4.0], [NAN, 3.0]])
    found = group_advantages(rewards, torch.tensor([1.0, 0.5]), 4, scale_rewards="none")
    mean = (1 + 4 + 1.5) / 3
    torch.testing.assert_close(found.advantages, torch.tensor([1 - mean, 0.0, 4 - mean, 1.5 - mean]))
    assert found.rewards[1].isnan()


def test_everyone_is_held_against_the_others():
    found = leave_one_out_advantages(column(1.0, 2.0, 6.0), ONE, 3, penalties=torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(found.advantages, torch.tensor([1 - 3.5, 1 - 3.5, 6 - 1.0]))
    torch.testing.assert_close(found.rewards, torch.tensor([1.0, 2.0, 6.0]))
    alone = leave_one_out_advantages(column(1.0, NAN, 3.0, 7.0), ONE, 2)
    torch.testing.assert_close(alone.advantages, torch.tensor([0.0, 0.0, -4.0, 4.0]))


def test_standard_deviation():
    values = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, 2.0]])
    torch.testing.assert_close(nan_std(values, 1), torch.tensor([math.sqrt(2), NAN]), equal_nan=True)
    torch.testing.assert_close(nan_std(values), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 1.5, [1.5, 0.5, 1.0, 1.0]),
        ("token_mask", 0.75, 1.5, [0.0, 0.0, 1.0, 1.0]),
        ("sequence_truncate", None, 0.9, [0.9, 0.9, 0.9, 0.9]),
        ("sequence_mask", 0.9, 1.05, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_importance_ratios(mode, low, high, expected):
    old = torch.log(torch.tensor([2.0, 0.5, 1.0, 7.0]))
    sampled = torch.tensor([0.0, 0.0, 0.0, NAN])
    branch = torch.tensor([0, 0, 1, 1])
    found = importance_ratios(old, sampled, branch, 2, mode=mode, low=low, high=high)
    torch.testing.assert_close(found.ratios, torch.tensor(expected))
    assert len(found.shown) == (2 if mode.startswith("sequence") else 4)


def test_what_does_not_count_has_no_say():
    old, branch = torch.log(torch.tensor([2.0, 3.0])), torch.tensor([0, 0])
    found = importance_ratios(
        old, torch.zeros(2), branch, 1, mode="sequence_mask", low=None, high=2.5, counts=torch.tensor([1.0, 0.0])
    )
    torch.testing.assert_close(found.ratios, torch.tensor([2.0, 2.0]))
