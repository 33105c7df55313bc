"""The loss and metrics of BCO against their formulas in float64; the classifier of prompts against scikit-learn's."""

import math

import pytest
import torch

from support.preferences import random_scores
from trl_fast.losses.bco import BCOLossConfig, bco_loss, bco_losses, bco_metrics, bco_rewards
from trl_fast.losses.density_ratio import density_ratios, fit_logistic
from trl_fast.losses.loss_inputs import KTOLossInputs

LABELS = torch.tensor([True, False, False, True])
BRANCH = torch.tensor([0, 0, 0, 1, 2, 2, 3])
REFERENCE = torch.tensor([-4.0, -1.0, -3.5, -2.0], dtype=torch.float64)
INPUTS = KTOLossInputs(BRANCH, LABELS, REFERENCE)
CONFIG = BCOLossConfig(beta=0.4)
SHIFT = torch.tensor(0.3, dtype=torch.float64)


def by_hand(rewards):
    return [math.log1p(math.exp(-(r - 0.3 if good else 0.3 - r))) for r, good in zip(rewards, LABELS, strict=True)]


def test_losses_and_gradient():
    rewards = torch.tensor([-0.5, 2.0, -3.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert bco_losses(rewards, LABELS, SHIFT).tolist() == pytest.approx(by_hand(rewards.tolist()), rel=1e-12)
    assert torch.autograd.gradcheck(lambda r: bco_losses(r, LABELS, SHIFT), rewards)
    weights = torch.tensor([1.0, 0.5, 3.0, 1.0])
    expected = sum(w * loss for w, loss in zip(weights.tolist(), by_hand(rewards.tolist()), strict=True)) / 4
    assert bco_loss(rewards, LABELS, SHIFT, weights).item() == pytest.approx(expected, rel=1e-12)


def test_what_is_not_a_number_is_left_out_of_the_mean():
    rewards = torch.tensor([-0.5, torch.nan, -3.0, 9.0], dtype=torch.float64)
    expected = [loss for loss in by_hand(rewards.tolist()) if not math.isnan(loss)]
    assert bco_loss(rewards, LABELS, SHIFT).item() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_metrics():
    scores = random_scores(len(BRANCH), dtype=torch.float64)
    logprobs = INPUTS.sequence_logprobs(scores.logprobs.detach())
    rewards = 0.4 * (logprobs - REFERENCE)
    torch.testing.assert_close(bco_rewards(scores.logprobs, INPUTS, CONFIG).detach(), rewards)
    metrics = bco_metrics(scores, INPUTS, SHIFT, CONFIG)
    expected = {
        "rewards/chosen": rewards[LABELS].mean(),
        "logps/rejected": logprobs[~LABELS].mean(),
        "logits/chosen": scores.mean_logits[LABELS[BRANCH]].mean(),
        "delta": SHIFT,
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].mean(), value)
    assert not any(metric.total.requires_grad for metric in metrics.values())


def test_the_classifier_is_scikit_learns():
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 5.0], [1.0, 1.0]])
    found = fit_logistic(features, torch.tensor([True, False, False, False, True]))
    # scikit-learn 1.9.1: LogisticRegression(class_weight="balanced", tol=1e-12)
    assert found.weights.tolist() == pytest.approx([-0.8617131228335521, -0.045665258594114584], rel=1e-6)
    assert found.intercept.item() == pytest.approx(1.111817459323052, rel=1e-6)
    logits = features.double() @ found.weights + found.intercept
    torch.testing.assert_close(found.probabilities(features), torch.sigmoid(logits))


def test_kinds_that_a_plane_parts_have_finite_weights():
    features = torch.cat([torch.ones(4, 3), -torch.ones(2, 3)]) * torch.tensor([1.0, 50.0, 0.0])
    found = fit_logistic(features, torch.tensor([True] * 4 + [False] * 2))
    assert found.weights.isfinite().all()
    assert (found.probabilities(features) > 0.5).tolist() == [True] * 4 + [False] * 2


def test_ratios_stay_in_their_bounds():
    ratios = density_ratios(torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64), 0.5, 10.0)
    assert ratios.tolist() == pytest.approx([0.5, 1.0, 3.0, 10.0], rel=1e-6)


def test_values_that_are_refused():
    with pytest.raises(ValueError, match="beta: expected .* got -1"):
        BCOLossConfig(beta=-1)
