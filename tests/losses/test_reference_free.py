"""The losses without a reference against their formulas, written out pair by pair, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from support.preferences import random_scores
from trl_fast.losses.loss_inputs import CompletionLossInputs
from trl_fast.losses.reference_free import (
    CPOLossConfig,
    ORPOLossConfig,
    TPOLossConfig,
    log_odds,
    reference_free_loss,
    reference_free_metrics,
    tpo_metrics,
)

# Of three prompts with three completions each: how many tokens are scored; those of prompts come with the first one.
PROMPTS, LENGTHS = (2, 0, 3), ((3, 2, 4), (1, 5, 2), (2, 2, 1))


def tokens(width):
    """Returns the completion and the place in it of each scored token."""
    branch, offset = [], []
    for number, (prompt, lengths) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        for column, length in enumerate(lengths[:width]):
            first = -prompt if column == 0 else 0
            branch += [number * width + column] * (length - first)
            offset += range(first, length)
    return torch.tensor(branch), torch.tensor(offset)


def given(width, seed=0):
    branch, offset = tokens(width)
    inputs = CompletionLossInputs(branch, offset, 3 * width, width)
    return inputs, random_scores(len(branch), seed, torch.float64)


def by_completion(inputs, scores):
    """Returns the log-probs of each completion's own tokens, and of its prompt's that are scored with it."""
    own, prompts = [[] for _ in range(inputs.num_completions)], [[] for _ in range(inputs.num_completions)]
    for completion, place, value in zip(
        inputs.branch.tolist(), inputs.offset.tolist(), scores.logprobs.tolist(), strict=True
    ):
        (own if place >= 0 else prompts)[completion].append(value)
    return own, prompts


def mean(values):
    return sum(values) / len(values)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def smoothed(x, eps):
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)


def odds(x):
    return x - math.log1p(-math.exp(x))


PAIR_LOSSES = {
    "sigmoid": lambda c, r: smoothed(0.4 * (sum(c) - sum(r)), 0.1),
    "hinge": lambda c, r: max(0, 1 - 0.4 * (sum(c) - sum(r))),
    "ipo": lambda c, r: (mean(c) - mean(r) - 1 / 0.8) ** 2,
    "simpo": lambda c, r: smoothed(0.4 * (mean(c) - mean(r)) - 0.3, 0.1),
    "tpo-l": lambda c, r: smoothed(0.4 * (mean(c) - mean(r)) - 0.3, 0.1),
    "orpo": lambda c, r: -0.4 * log_sigmoid(odds(mean(c)) - odds(mean(r))),
}


def config_of(name, method):
    if method == "orpo":
        return ORPOLossConfig(beta=0.4)
    eps = 0 if name in ("hinge", "ipo") else 0.1
    if method == "cpo":
        return CPOLossConfig(beta=0.4, loss_type=name, label_smoothing=eps, cpo_alpha=0.7, simpo_gamma=0.3)
    return TPOLossConfig(beta=0.4, loss_type=name, label_smoothing=eps, tpo_alpha=0.7, tpo_l_gamma=0.3)


CASES = [
    ("orpo", "orpo"),
    *((name, "cpo") for name in ("sigmoid", "hinge", "ipo", "simpo")),
    *((name, "tpo") for name in ("sigmoid", "hinge", "ipo", "tpo-l")),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_loss_and_its_shares(name, method):
    config, width = config_of(name, method), 3 if method == "tpo" else 2
    inputs, scores = given(width)
    own, prompts = by_completion(inputs, scores)
    pairs = [PAIR_LOSSES[name](own[number * width], own[number * width + 1]) for number in range(3)]
    learned = sum(own[2::3], []) if method == "tpo" else sum(own[0::2], [])
    if method == "orpo":
        learned += sum(prompts, [])
    weight = 1 if method == "orpo" else 0.7
    loss = reference_free_loss(scores, inputs, config)
    assert loss.item() == pytest.approx(mean(pairs) - weight * mean(learned), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda logprobs: reference_free_loss(SimpleNamespace(logprobs=logprobs), inputs, config), scores.logprobs
    )

    ends = [(inputs.branch // width == number).sum().item() for number in range(3)]
    shares = [
        reference_free_loss(SimpleNamespace(logprobs=scores.logprobs[rows]), inputs, config, rows)
        for rows in torch.arange(len(inputs.branch)).split(ends)
    ]
    torch.testing.assert_close(sum(shares), loss)
    gradients = [torch.autograd.grad(each, scores.logprobs)[0] for each in (loss, sum(shares))]
    torch.testing.assert_close(*gradients)


def test_without_a_likelihood_term_the_gold_completion_is_not_read():
    inputs, scores = given(3)
    config = TPOLossConfig(tpo_alpha=0.0)
    (grad,) = torch.autograd.grad(reference_free_loss(scores, inputs, config), scores.logprobs)
    assert config.num_completions == 2 and not grad[inputs.of(2)].any() and grad[inputs.of(0)].all()


def test_the_reward_of_alphapo():
    inputs, scores = given(2)
    config = CPOLossConfig(beta=0.4, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.3, alpha=0.25)
    own, _ = by_completion(inputs, scores)
    rewards = [(1 - math.exp(mean(each)) ** -0.25) / 0.25 for each in own]
    losses = [smoothed(0.4 * (rewards[2 * number] - rewards[2 * number + 1]) - 0.3, 0.0) for number in range(3)]
    assert reference_free_loss(scores, inputs, config).item() == pytest.approx(mean(losses), rel=1e-12)
    metrics = reference_free_metrics(scores, inputs, config)
    assert metrics["rewards/chosen"].mean().item() == pytest.approx(0.4 * mean(rewards[0::2]), rel=1e-12)
    # Of sums of a long completion's log-probs: TRL's difference of two infinite rewards is not a number.
    far = CPOLossConfig(alpha=0.25).shaped(torch.tensor([-900.0, -901.0]))
    assert far.isfinite().all()


def test_log_odds_have_all_digits_and_a_finite_gradient():
    exact = torch.tensor([-3.0, -0.1, -1e-9, -1e-30], dtype=torch.float64)
    logprobs = exact.float().requires_grad_()
    found = log_odds(logprobs)
    torch.testing.assert_close(found.double(), exact - torch.log(-torch.expm1(exact)), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), logprobs)
    torch.testing.assert_close(grad.double(), -1 / torch.expm1(exact), rtol=1e-6, atol=0)
    certain = torch.zeros(1, requires_grad=True)
    (grad,) = torch.autograd.grad(log_odds(certain).sum(), certain)
    assert log_odds(certain).isfinite().all() and grad.item() == 0


@pytest.mark.parametrize("method", ["orpo", "cpo"])
def test_metrics(method):
    config = config_of("simpo", method)
    inputs, scores = given(2)
    own, prompts = by_completion(inputs, scores)
    likelihoods = [mean(each) for each in own]
    chosen, rejected = likelihoods[0::2], likelihoods[1::2]
    differences = [odds(c) - odds(r) for c, r in zip(chosen, rejected, strict=True)]
    mean_logits, chosen_tokens = scores.mean_logits, (inputs.branch % 2 == 0) & (inputs.offset >= 0)
    expected = {
        "rewards/chosen": 0.4 * mean(chosen),
        "rewards/rejected": 0.4 * mean(rejected),
        "rewards/accuracies": mean([float(c > r) for c, r in zip(chosen, rejected, strict=True)]),
        "rewards/margins": 0.4 * (mean(chosen) - mean(rejected)),
        "logps/rejected": mean(rejected),
        "logps/chosen": mean(chosen),
        "logits/rejected": mean_logits[inputs.branch % 2 == 1].mean().item(),
        "logits/chosen": mean_logits[chosen_tokens].mean().item(),
        "nll_loss": -mean(sum(own[0::2], []) + (sum(prompts, []) if method == "orpo" else [])),
    }
    if method == "orpo":
        expected |= {
            "log_odds_ratio": mean([log_sigmoid(each) for each in differences]),
            "log_odds_chosen": mean(differences),
        }
    metrics = reference_free_metrics(scores, inputs, config)
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert metrics[name].mean().item() == pytest.approx(value, rel=1e-7), name
        assert not metrics[name].total.requires_grad


def test_metrics_of_tpo():
    inputs, scores = given(3)
    own, _ = by_completion(inputs, scores)
    metrics = tpo_metrics(scores, inputs, config_of("sigmoid", "tpo"))
    chosen = (inputs.branch % 3 == 0) & (inputs.offset >= 0)
    expected = {
        "entropy": scores.entropy.mean().item(),
        "mean_token_accuracy": scores.is_top1[chosen].double().mean().item(),
        "logps/rejected": mean([sum(own[number * 3 + 1]) for number in range(3)]),
        "rewards/chosen": 0.4 * mean([sum(own[number * 3]) for number in range(3)]),
    }
    for name, value in expected.items():
        assert metrics[name].mean().item() == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CPOLossConfig(loss_type="simp"), "loss_type='simp' is unknown.*did you mean 'simpo'"),
        (lambda: CPOLossConfig(loss_type="tpo-l"), "loss_type='tpo-l' is unknown; expected one of sigmoid"),
        (lambda: TPOLossConfig(loss_type="simpo"), "loss_type='simpo' is unknown; expected one of sigmoid"),
        (lambda: CPOLossConfig(loss_type="ipo", beta=0.0), "beta=0: loss_type='ipo'"),
        (lambda: ORPOLossConfig(beta=-1), "beta: expected .* got -1"),
        (lambda: CPOLossConfig(cpo_alpha=float("nan")), "cpo_alpha: expected .* got nan"),
        (lambda: TPOLossConfig(tpo_alpha=-0.5), "tpo_alpha: expected .* got -0.5"),
        (lambda: CPOLossConfig(label_smoothing=1.5), "label_smoothing: expected .* got 1.5"),
    ],
)
def test_values_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_smoothing_that_a_loss_does_not_take_is_a_warning():
    with pytest.warns(UserWarning, match="label_smoothing=0.1 has no effect on loss_type='hinge'"):
        CPOLossConfig(loss_type="hinge", label_smoothing=0.1)
