"""The KTO losses and metrics against their formulas, written out sequence by sequence, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from support.preferences import random_scores
from trl_fast.losses.kto import KTOLossConfig, count_losses, kl_estimate, kto_loss_sum, kto_losses, kto_metrics
from trl_fast.losses.loss_inputs import KTOLossInputs

LABELS = torch.tensor([True, False, False, True, True])
# Sequence 3 has no scored token: its prompt is empty, and nothing predicts its only one.
BRANCH = torch.tensor([0, 0, 0, 1, 2, 2, 4, 4])
REFERENCE = torch.tensor([-4.0, -1.0, -3.5, 0.0, -2.0], dtype=torch.float64)
KL = torch.tensor(0.3, dtype=torch.float64)
LOSS_INPUTS = KTOLossInputs(BRANCH, LABELS, REFERENCE)
CONFIG = KTOLossConfig(beta=0.4, desirable_weight=0.7, undesirable_weight=1.9)


def scores(seed=0):
    return random_scores(len(BRANCH), seed, torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(logratios, kl):
    """TRL's formulas, as they stand in the papers."""
    return [
        0.7 * (1 - sigmoid(0.4 * (r - kl))) if good else 1.9 * (1 - sigmoid(0.4 * (kl - r)))
        for r, good in zip(logratios, LABELS.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kl", [0.0, 0.3, 7.0])
def test_losses_and_gradient(kl):
    logratios = torch.tensor([-0.5, 2.0, -3.0, 0.0, 9.0], dtype=torch.float64, requires_grad=True)
    given = torch.tensor(kl, dtype=torch.float64)
    losses = kto_losses(logratios, LABELS, given, CONFIG)
    assert losses.tolist() == pytest.approx(by_hand(logratios.tolist(), kl), rel=1e-12)
    assert torch.autograd.gradcheck(lambda r: kto_losses(r, LABELS, given, CONFIG), logratios)


def test_apo_zero_is_the_loss_without_a_reference_point():
    logratios = torch.tensor([-0.5, 2.0, -3.0, 0.0, 9.0], dtype=torch.float64)
    config = KTOLossConfig("apo_zero_unpaired", beta=0.4)
    assert not config.needs_kl and KTOLossConfig().needs_kl
    expected = [
        1 - sigmoid(0.4 * r) if good else sigmoid(0.4 * r)
        for r, good in zip(logratios.tolist(), LABELS.tolist(), strict=True)
    ]
    losses = kto_losses(logratios, LABELS, torch.zeros((), dtype=torch.float64), config)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)


def test_shares_of_sequences_sum_to_the_loss():
    given = scores()
    whole = kto_loss_sum(given, LOSS_INPUTS, KL, CONFIG)
    logratios = (LOSS_INPUTS.sequence_logprobs(given.logprobs) - REFERENCE).tolist()
    assert whole.item() == pytest.approx(sum(by_hand(logratios, KL.item())), rel=1e-12)
    shares = []
    for rows in torch.arange(len(BRANCH)).split([4, 2, 2]):
        part = SimpleNamespace(logprobs=given.logprobs[rows])
        shares.append(kto_loss_sum(part, LOSS_INPUTS, KL, CONFIG, rows))
    torch.testing.assert_close(sum(shares), whole)
    gradients = [torch.autograd.grad(loss, given.logprobs)[0] for loss in (whole, sum(shares))]
    torch.testing.assert_close(*gradients)


def test_what_is_not_a_number_is_left_out_of_the_mean():
    given = scores()
    with torch.no_grad():
        given.logprobs[4] = -torch.inf
    loss_inputs = KTOLossInputs(BRANCH, LABELS, REFERENCE.clone().index_fill(0, torch.tensor(2), -torch.inf))
    losses = kto_losses(loss_inputs.sequence_logprobs(given.logprobs) - loss_inputs.ref_logprobs, LABELS, KL, CONFIG)
    assert losses.isnan().tolist() == [False, False, True, False, False]
    mean = kto_loss_sum(given, loss_inputs, KL, CONFIG) / count_losses(given, loss_inputs, KL)
    torch.testing.assert_close(mean, losses.nanmean())


def test_the_estimate_has_no_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([-2.0, -2.5]))
    assert estimate.item() == 0.75 and not estimate.requires_grad


def test_metrics():
    given = scores()
    metrics = kto_metrics(given, LOSS_INPUTS, KL, CONFIG, lambda values: values)
    order = ["kl", "entropy", "logits/chosen", "logits/rejected", "rewards/chosen", "logps/chosen"]
    assert list(metrics) == [*order, "rewards/rejected", "logps/rejected", "rewards/margins"]
    logprobs = LOSS_INPUTS.sequence_logprobs(given.logprobs.detach())
    rewards = 0.4 * (logprobs - REFERENCE)
    good_tokens = LABELS[BRANCH]
    expected = {
        "kl": KL,
        "entropy": given.entropy.mean(),
        "logits/chosen": given.mean_logits[good_tokens].mean(),
        "rewards/rejected": rewards[~LABELS].mean(),
        "logps/chosen": logprobs[LABELS].mean(),
        "rewards/margins": rewards[LABELS].mean() - rewards[~LABELS].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].mean(), value)
    assert not any(metric.total.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("label", [True, False])
def test_what_a_batch_does_not_have_is_not_counted(label):
    loss_inputs = KTOLossInputs(BRANCH, torch.full((5,), label), REFERENCE)
    metrics = kto_metrics(scores(), loss_inputs, KL, CONFIG, lambda values: values)
    absent = "rejected" if label else "chosen"
    uncounted = {name for name, metric in metrics.items() if metric.count == 0}
    assert uncounted == {*(f"{name}/{absent}" for name in ("logits", "rewards", "logps")), "rewards/margins"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": "bco"}, "loss_type='bco' is unknown; expected one of kto, apo_zero_unpaired"),
        ({"beta": 0}, "beta: expected a finite number > 0, got 0"),
        ({"desirable_weight": -1}, "desirable_weight: .* got -1"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight: .* got nan"),
    ],
)
def test_values_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KTOLossConfig(**settings)
