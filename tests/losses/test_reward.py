"""The reward loss and its metrics against their formulas in float64, written out pair by pair."""

import math

import pytest
import torch

from trl_fast.losses.reward import reward_loss, reward_metrics

REWARDS = [1.5, -0.5, 0.25, 0.75, -2.0, -2.0]
MARGINS = [0.5, 0.0, -1.0]


def by_hand(rewards, margins, coefficient):
    pairs = list(zip(rewards[0::2], rewards[1::2], strict=True))
    terms = [
        math.log1p(math.exp(-(chosen - rejected - margin))) + coefficient * (chosen + rejected) ** 2
        for (chosen, rejected), margin in zip(pairs, margins, strict=True)
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("margins", [None, MARGINS])
@pytest.mark.parametrize("coefficient", [None, 0.0, 0.3])
def test_loss_and_gradient(margins, coefficient):
    rewards = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    given = None if margins is None else torch.tensor(margins, dtype=torch.float64)
    loss = reward_loss(rewards, given, coefficient)
    assert loss.item() == pytest.approx(by_hand(REWARDS, margins or [0] * 3, coefficient or 0), rel=1e-12)
    assert torch.autograd.gradcheck(lambda r: reward_loss(r, given, coefficient), rewards)


def test_far_apart_rewards_stay_finite():
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = reward_loss(rewards)
    loss.backward()
    assert loss.item() == 2e4
    assert rewards.grad.tolist() == [-1, 1]


def test_metrics():
    rewards = torch.tensor(REWARDS, requires_grad=True)
    metrics = reward_metrics(rewards)
    assert list(metrics) == ["min_reward", "mean_reward", "max_reward", "accuracy", "margin"]
    # A tie counts as a miss.
    assert [metric.mean().item() for metric in metrics.values()] == pytest.approx([-2, -1 / 3, 1.5, 1 / 3, 0.5])
    assert not any(metric.total.requires_grad for metric in metrics.values())
