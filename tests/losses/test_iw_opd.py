"""Importance-weighted on-policy distillation against its formula, written out for each completion."""

import pytest
import torch

from trl_fast.losses.iw_opd import IWOPDInputs, IWOPDLossConfig, iw_opd_loss, iw_opd_metrics
from trl_fast.ops import TokenScores

LENGTHS = (4, 1, 6, 3)
CONFIG = IWOPDLossConfig(gamma=0.7, epsilon=0.3)


def example(with_rollout):
    generator = torch.Generator().manual_seed(3)
    count = sum(LENGTHS)
    own, teacher, rollout = (-torch.rand(count, generator=generator) * 4 for _ in range(3))
    rollout[5] = torch.nan
    weights = torch.full((count,), 0.25)
    weights[[2, 8]] = 0.0
    # One completion on which both agree: its sum is below epsilon.
    teacher[-3:] = rollout[-3:] = own[-3:] + 1e-3
    branch = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return own.requires_grad_(), IWOPDInputs(branch, len(LENGTHS), weights, teacher, rollout if with_rollout else None)


def terms(own, inputs):
    """Advantages, weights and terms of the loss, token by token."""
    found, start = [], 0
    for length in LENGTHS:
        rows = range(start, start + length)
        sampled = own.tolist() if inputs.rollout_logprobs is None else inputs.rollout_logprobs.tolist()
        known = [own[i].item() if sampled[i] != sampled[i] else sampled[i] for i in rows]
        a = [
            (inputs.teacher_logprobs[i].item() - s) * (inputs.weights[i] != 0).item()
            for i, s in zip(rows, known, strict=True)
        ]
        total = max(sum(map(abs, a)), CONFIG.epsilon)
        for place, i in enumerate(rows):
            w = 1 + CONFIG.gamma * (1 - sum(map(abs, a[:place])) / total)
            found.append((a[place], w, -inputs.weights[i] * w * a[place] * own[i]))
        start += length
    return found


@pytest.mark.parametrize("with_rollout", [False, True])
def test_the_loss_is_its_formula(with_rollout):
    own, inputs = example(with_rollout)
    wanted = sum(term for _, _, term in terms(own, inputs))
    (expected,) = torch.autograd.grad(wanted, own)
    loss = iw_opd_loss(TokenScores(logprobs=own), inputs, CONFIG)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, own)[0], expected)


def test_completions_may_be_computed_apart():
    own, inputs = example(True)
    whole = iw_opd_loss(TokenScores(logprobs=own), inputs, CONFIG)
    parts = [torch.arange(0, 5), torch.arange(5, 14)]
    found = [iw_opd_loss(TokenScores(logprobs=own[rows]), inputs, CONFIG, rows=rows) for rows in parts]
    torch.testing.assert_close(sum(found), whole)


def test_metrics_are_of_tokens_that_count():
    own, inputs = example(False)
    counted = [(a, w) for (a, w, _), weight in zip(terms(own, inputs), inputs.weights.tolist(), strict=True) if weight]
    weights = [w for _, w in counted]
    expected = {
        "iw_opd/mean_advantage": sum(a * w for a, w in counted) / len(counted),
        "iw_opd/mean_abs_advantage": sum(abs(a) for a, _ in counted) / len(counted),
        "iw_opd/mean_weight": sum(weights) / len(weights),
        "iw_opd/min_weight": min(weights),
        "iw_opd/max_weight": max(weights),
    }
    found = iw_opd_metrics(TokenScores(logprobs=own.detach()), inputs, CONFIG)
    assert {name: metric.mean().item() for name, metric in found.items()} == pytest.approx(expected, rel=1e-5)


def test_nothing_to_learn_from_is_no_nan():
    own, inputs = example(False)
    nothing = IWOPDInputs(inputs.branch, len(LENGTHS), torch.zeros_like(inputs.weights), inputs.teacher_logprobs)
    assert iw_opd_loss(TokenScores(logprobs=own), nothing, CONFIG) == 0
    assert {
        metric.mean().item() for metric in iw_opd_metrics(TokenScores(logprobs=own), nothing, CONFIG).values()
    } == {0}
