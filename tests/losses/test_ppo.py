"""PPO's targets and losses against loops over tokens in float64, and against padded matrices as TRL had them."""

import math

import pytest
import torch

from trl_fast.losses.ppo import (
    KLController,
    States,
    gae,
    kl_penalties,
    ppo_loss_inputs,
    ppo_policy_loss,
    ppo_targets,
    rollout_metrics,
    state_rewards,
    update_metrics,
    value_loss,
    whiten,
)
from trl_fast.ops import TokenScores

LENGTHS = torch.tensor([3, 6, 1, 5, 6])
WIDTH = 6
# TRL's matrix of completions is as wide as the longest, which so have no state after their last token.
STATES = States(LENGTHS, LENGTHS < WIDTH)
N, M, S = int(LENGTHS.sum()), int(STATES.counts.sum()), len(LENGTHS)


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(packed, counts, fill=0.0):
    """(S, WIDTH), padded on the right."""
    rows = torch.full((S, WIDTH), fill, dtype=packed.dtype)
    for row, part in zip(rows, packed.split(counts.tolist()), strict=True):
        row[: len(part)] = part
    return rows


def packed(rows, counts):
    return torch.cat([row[:count] for row, count in zip(rows, counts.tolist(), strict=True)])


def test_states():
    assert STATES.counts.tolist() == [4, 6, 2, 6, 6]
    assert STATES.last.tolist() == [3, 9, 11, 17, 23]
    assert [index for index, flag in enumerate(STATES.is_token.tolist()) if not flag] == [3, 11, 17]


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 1.0), (1.0, 0.0)])
def test_gae_by_double_loop(gamma, lam):
    rewards, values = random(M), random(M, seed=1)
    expected = []
    for r, v in zip(rewards.split(STATES.counts.tolist()), values.split(STATES.counts.tolist()), strict=True):
        following = [*v.tolist()[1:], 0.0]
        deltas = [a + gamma * b - c for a, b, c in zip(r.tolist(), following, v.tolist(), strict=True)]
        expected += [
            sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
    assert gae(rewards, values, STATES, gamma, lam).tolist() == pytest.approx(expected, rel=1e-12)


def test_gae_of_a_single_state():
    alone = States(torch.tensor([1]), torch.tensor([False]))
    assert gae(torch.tensor([2.0]), torch.tensor([0.5]), alone).tolist() == [1.5]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    values = random(40) * 3 + 5
    found = whiten(values, shift_mean)
    assert found.var().item() == pytest.approx(1, rel=1e-6)
    assert found.mean().item() == pytest.approx(0 if shift_mean else values.mean().item(), abs=1e-9)
    assert whiten(torch.ones(3)).tolist() == [0, 0, 0]
    assert whiten(torch.ones(1)).tolist() == [0]


def test_kl_estimators():
    logprobs, reference = -random(N).abs(), -random(N, seed=1).abs()
    k1, k3 = (kl_penalties(logprobs, reference, estimator) for estimator in ("k1", "k3"))
    for p, q, one, three in zip(*(x.tolist() for x in (logprobs, reference, k1, k3)), strict=True):
        assert one == pytest.approx(p - q, abs=1e-12)
        assert three == pytest.approx(math.exp(q - p) - 1 - (q - p), abs=1e-12)
    assert (k3 >= 0).all()
    with pytest.raises(ValueError, match="kl_estimator='k2' is unknown; expected one of k1, k3"):
        kl_penalties(logprobs, reference, "k2")


def test_the_score_is_at_the_last_state():
    kl, scores = random(N), random(S, seed=2)
    rewards = state_rewards(kl, scores, 0.1, STATES)
    for length, has_end, row, own, score in zip(
        LENGTHS.tolist(),
        STATES.has_end.tolist(),
        rewards.split(STATES.counts.tolist()),
        kl.split(LENGTHS.tolist()),
        scores.tolist(),
        strict=True,
    ):
        expected = [-0.1 * value for value in own.tolist()] + [0.0] * has_end
        assert len(expected) == length + has_end
        expected[-1] += score
        assert row.tolist() == pytest.approx(expected, rel=1e-12)


def masked_whitening(values, mask, shift_mean=True):
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / (mask.sum() - 1)
    return (values - mean) / (variance + 1e-8).sqrt() + (0 if shift_mean else mean)


def dense_targets(logprobs, reference, scores, values, *, kl_coef, gamma, lam, whiten_rewards, estimator):
    """The last PPO of TRL: matrices (S, WIDTH), padded log-probs 1, the score one place behind the last token."""
    places = torch.arange(WIDTH).expand(S, WIDTH)
    ends = LENGTHS[:, None]
    is_token, is_state = places < ends, places <= ends
    d = matrix(reference, LENGTHS, 1.0) - matrix(logprobs, LENGTHS, 1.0)
    rewards = -kl_coef * (-d if estimator == "k1" else d.exp() - 1 - d)
    for row, length in enumerate(LENGTHS.tolist()):
        rewards[row, min(length, WIDTH - 1)] += scores[row]
    if whiten_rewards:
        rewards = torch.where(is_state, masked_whitening(rewards, is_state, shift_mean=False), 0.0)
    columns, advantage = [], torch.zeros(S, dtype=torch.float64)
    for t in reversed(range(WIDTH)):
        following = values[:, t + 1] if t < WIDTH - 1 else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return masked_whitening(advantages, is_token), advantages + values, is_token, is_state


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_targets_are_those_of_padded_matrices(estimator, whiten_rewards):
    logprobs, reference, scores = -random(N).abs(), -random(N, seed=1).abs(), random(S, seed=2)
    values = random(M, seed=3)
    settings = {"kl_coef": 0.2, "gamma": 0.98, "lam": 0.9, "whiten_rewards": whiten_rewards}
    kl = kl_penalties(logprobs, reference, estimator)
    found = ppo_targets(kl, scores, values, STATES, **settings)
    advantages, returns, is_token, is_state = dense_targets(
        *(logprobs, reference, scores, matrix(values, STATES.counts)), **settings, estimator=estimator
    )
    torch.testing.assert_close(found.advantages, advantages[is_token], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.returns, returns[is_state], rtol=1e-10, atol=1e-10)


def test_policy_loss_by_hand():
    old, advantages = -random(N).abs(), random(N, seed=1)
    logprobs = (old + random(N, seed=2, scale=0.4)).requires_grad_()
    entropy = random(N, seed=3).abs()
    table = ppo_loss_inputs(old, advantages)
    loss = ppo_policy_loss(TokenScores(logprobs, entropy), table, 0.2)
    terms, clipped, ratios = [], 0, []
    for new, before, a in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(new - before)
        bounded = min(max(ratio, 0.8), 1.2)
        terms.append(max(-a * ratio, -a * bounded))
        clipped += -a * bounded > -a * ratio
        ratios.append(ratio)
    assert 0 < clipped < N
    assert loss.item() == pytest.approx(sum(terms) / N, rel=1e-12)
    halves = [ppo_policy_loss(TokenScores(logprobs[rows], entropy[rows]), table, 0.2, rows) for rows in parts()]
    assert sum(halves).item() == pytest.approx(loss.item(), rel=1e-12)

    value = value_loss(random(M), random(M, seed=5), random(M, seed=6), 0.2)
    metrics = update_metrics(TokenScores(logprobs.detach(), entropy), table, value, 0.2)
    means = {name: metric.mean().item() for name, metric in metrics.items()}
    differences = [new - before for new, before in zip(logprobs.tolist(), old.tolist(), strict=True)]
    assert means == pytest.approx(
        {
            "policy/approxkl_avg": 0.5 * sum(d * d for d in differences) / N,
            "policy/clipfrac_avg": clipped / N,
            "loss/policy_avg": loss.item(),
            "policy/entropy_avg": entropy.mean().item(),
            "val/ratio": sum(ratios) / N,
            "loss/value_avg": value.loss.item(),
            "val/clipfrac_avg": value.clipped.double().mean().item(),
        },
        rel=1e-6,
    )


def parts():
    rows = torch.arange(N)
    return rows[: N // 2], rows[N // 2 :]


def test_value_loss_by_hand():
    values, old, returns = (random(M, seed=seed) for seed in (0, 1, 2))
    values.requires_grad_()
    found = value_loss(values, old, returns, 0.3)
    total = 0.0
    for v, before, r, flag in zip(
        values.tolist(), old.tolist(), returns.tolist(), found.clipped.tolist(), strict=True
    ):
        near = min(max(v, before - 0.3), before + 0.3)
        total += max((v - r) ** 2, (near - r) ** 2)
        assert flag == ((near - r) ** 2 > (v - r) ** 2)
    assert found.loss.item() == pytest.approx(0.5 * total / M, rel=1e-12)
    assert 0 < found.clipped.sum() < M
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, 0.3).loss, values)


def test_rollout_metrics():
    logprobs, kl, scores = -random(N).abs(), random(N, seed=1), random(S, seed=2)
    means = {name: metric.mean().item() for name, metric in rollout_metrics(logprobs, kl, scores, 0.1).items()}
    assert means == pytest.approx(
        {
            "objective/kl": kl.sum().item() / S,
            "objective/entropy": -logprobs.sum().item() / S,
            "objective/non_score_reward": -0.1 * kl.sum().item() / S,
            "objective/rlhf_reward": (scores.sum() - 0.1 * kl.sum()).item() / S,
            "objective/scores": scores.mean().item(),
        }
    )


def test_kl_control():
    fixed = KLController(0.05)
    fixed.update(100.0, 64)
    assert fixed.coefficient == 0.05
    steered = KLController(0.2, target=6.0, horizon=1000)
    steered.update(6.6, 64)
    assert steered.coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.064))
    steered.update(1e9, 64)
    assert steered.coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.064) * (1 + 0.2 * 0.064))
    steered.update(0.0, 500)
    assert steered.coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.064) * (1 + 0.2 * 0.064) * 0.9)
