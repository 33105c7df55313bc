"""Policy losses on [N] vectors: against formulas written token by token, by the fused op, and share by share."""

import math
from types import SimpleNamespace

import pytest
import torch

from trl_fast.losses import policy_gradient as policy
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.loss_normalization import LossNormalizer
from trl_fast.losses.policy_gradient import LOSSES, PolicyLossConfig, grpo_loss, sequence_weights

LENGTHS = [3, 1, 5, 2]


def table(seed=0, **vectors):
    generator = torch.Generator().manual_seed(seed)

    def noise(count, scale=0.3):
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    tokens = sum(LENGTHS)
    logprobs = -1 + noise(tokens)
    made = PolicyLossInputs(
        branch=torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        advantages=torch.tensor([1.3, -0.7, 0.4, -2.0], dtype=torch.float64),
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        old_logprobs=logprobs.detach() + noise(tokens),
        ref_logprobs=logprobs.detach() + noise(tokens),
        **vectors,
    )
    entropy = noise(tokens).abs()
    return SimpleNamespace(logprobs=logprobs.requires_grad_(), entropy=entropy.requires_grad_()), made


def token_by_token(scores, made, config):
    """The formulas once more, with numbers instead of vectors; `clip`, `cispo` and `sapo` at the token level."""
    total = 0.0
    for index, branch in enumerate(made.branch.tolist()):
        advantage, logprob = made.advantages[branch].item(), scores.logprobs[index]
        rho = torch.exp(logprob - made.old_logprobs[index])
        if config.loss_type == "cispo":
            term = -min(rho.item(), config.upper) * advantage * logprob
        elif config.loss_type == "sapo":
            tau = config.sapo_temperature_pos if advantage > 0 else config.sapo_temperature_neg
            term = -4 / tau / (1 + torch.exp(-tau * (rho - 1))) * advantage
        else:
            bounded = rho.clamp(1 - config.epsilon, 1 + config.upper)
            capped = rho.clamp(max=config.delta or math.inf)
            term = -torch.minimum(capped * advantage, bounded * advantage)
        gap = made.ref_logprobs[index] - logprob
        kl = torch.exp(gap) - gap - 1
        term = term + config.beta * kl * (rho if config.use_bias_correction_kl else 1)
        total = total + made.weights[branch] * term
    return total


CONFIGS = [
    {"loss_type": "dapo", "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.2},
    {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.7},
]


@pytest.mark.parametrize("settings", CONFIGS, ids=lambda settings: settings["loss_type"])
@pytest.mark.parametrize("fused", [False, True])
def test_formulas(settings, fused, monkeypatch):
    monkeypatch.setattr(policy, "_kernel_serves", lambda *_: fused)
    config = PolicyLossConfig(**settings)
    scores, made = table()
    expected = token_by_token(scores, made, config)
    (expected_grad,) = torch.autograd.grad(expected, scores.logprobs)
    loss = grpo_loss(scores, made, config)
    (grad,) = torch.autograd.grad(loss, scores.logprobs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence", "product"])
@pytest.mark.parametrize("name", LOSSES)
def test_shares_sum_to_the_loss(name, level):
    config = PolicyLossConfig(loss_type=name, importance_sampling_level=level, beta=0.1, off_policy_mask_threshold=0.1)
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    scores, made = table(mask=mask, importance_ratios=torch.linspace(0.5, 1.5, 11, dtype=torch.float64))
    whole = grpo_loss(scores, made, config, entropy_coef=0.2)
    shares = 0.0
    for rows in (torch.arange(0, 4), torch.arange(4, 9), torch.arange(9, 11)):
        part = SimpleNamespace(logprobs=scores.logprobs[rows], entropy=scores.entropy[rows])
        shares = shares + grpo_loss(part, made, config, entropy_coef=0.2, rows=rows)
    for output in ("logprobs", "entropy"):
        expected, got = (
            torch.autograd.grad(loss, getattr(scores, output), retain_graph=True)[0] for loss in (whole, shares)
        )
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(shares, whole)
    assert torch.autograd.grad(whole, scores.logprobs)[0][1] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo", [1 / 12, 1 / 4, 1 / 20, 1 / 8]),
        ("bnpo", [1 / 11] * 4),
        ("dr_grpo", [1 / 32] * 4),
        ("dapo", [1 / 44] * 4),
        ("luspo", [1 / 4] * 4),
    ],
)
def test_weights(name, expected):
    lengths = torch.tensor(LENGTHS, dtype=torch.float32)
    for steps in (1, 3):
        weights = sequence_weights(name, lengths, LossNormalizer(44, steps, 8))
        scale = 1 if LOSSES[name].over_whole_step else steps
        torch.testing.assert_close(weights * scale, torch.tensor(expected))


def test_what_cannot_be_is_named():
    for settings in ({"loss_type": "ppo"}, {"importance_sampling_level": "word"}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name}=.* is unknown"):
            PolicyLossConfig(**settings)
