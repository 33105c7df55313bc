"""The DPO losses against a plain transcription of their papers' formulas, pair by pair, in Python floats."""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from support.preferences import random_pairs, random_scores
from trl_fast.data import PreferenceCollator
from trl_fast.losses.dpo import F_DIVERGENCE_LOSSES, PAIR_LOSSES, DPOLossConfig, dpo_loss, dpo_metrics
from trl_fast.losses.f_divergences import F_DIVERGENCES
from trl_fast.losses.loss_inputs import PreferenceLossInputs

BETA, EPS, TAU, ALPHA_DIV = 0.3, 0.15, 0.4, 0.4


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def score(r, divergence):
    return {
        "reverse_kl": lambda: r,
        "forward_kl": lambda: 1 - math.exp(-r),
        "js_divergence": lambda: math.log(2 * math.exp(r) / (math.exp(r) + 1)),
        "alpha_divergence": lambda: (math.exp(r) ** (ALPHA_DIV - 1) - 1) / (ALPHA_DIV - 1),
    }[divergence]()


def smoothed(d):
    return -(1 - EPS) * log_sigmoid(BETA * d) - EPS * log_sigmoid(-BETA * d)


def expected_pair_losses(name, pairs, divergence):
    """One loss a pair; a pair is (log π_c, log π_r, log ref_c, log ref_r, |y_c|, |y_r|, chosen token log-probs)."""
    rc = [p[0] - p[2] for p in pairs]
    rr = [p[1] - p[3] for p in pairs]
    if name == "aot":
        policy, reference = sorted(p[0] - p[1] for p in pairs), sorted(p[2] - p[3] for p in pairs)
        return [smoothed(a - b) for a, b in zip(policy, reference, strict=True)]
    if name == "aot_unpaired":
        return [smoothed(a - b) for a, b in zip(sorted(rc), sorted(rr), strict=True)]
    if name == "sft":
        return [-statistics.fmean(itertools.chain(*(p[6] for p in pairs)))] * len(pairs)
    sc, sr = [score(r, divergence) for r in rc], [score(r, divergence) for r in rr]
    per_pair = {
        "sigmoid": lambda c, r, sc, sr, nc, nr: -log_sigmoid(BETA * (sc - sr)),
        "sigmoid_norm": lambda c, r, sc, sr, nc, nr: -log_sigmoid(BETA * (sc / nc - sr / nr)),
        "robust": lambda c, r, sc, sr, nc, nr: (
            (-(1 - EPS) * log_sigmoid(BETA * (sc - sr)) + EPS * log_sigmoid(-BETA * (sc - sr))) / (1 - 2 * EPS)
        ),
        "hinge": lambda c, r, sc, sr, nc, nr: max(0.0, 1 - BETA * (sc - sr)),
        "ipo": lambda c, r, sc, sr, nc, nr: (sc / nc - sr / nr - 1 / (2 * BETA)) ** 2,
        "exo_pair": lambda c, r, sc, sr, nc, nr: sum(
            q * math.log(q / target)
            for q, target in zip((sigmoid(BETA * (sc - sr)), sigmoid(-BETA * (sc - sr))), (1 - EPS, EPS), strict=True)
        ),
        "nca_pair": lambda c, r, sc, sr, nc, nr: (
            -log_sigmoid(BETA * c) - 0.5 * log_sigmoid(-BETA * c) - 0.5 * log_sigmoid(-BETA * r)
        ),
        "bco_pair": lambda c, r, sc, sr, nc, nr: -log_sigmoid(BETA * c) - log_sigmoid(-BETA * r),
        "sppo_hard": lambda c, r, sc, sr, nc, nr: (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2,
        "apo_zero": lambda c, r, sc, sr, nc, nr: (1 - sigmoid(BETA * c)) + sigmoid(BETA * r),
        "apo_down": lambda c, r, sc, sr, nc, nr: sigmoid(BETA * c) + (1 - sigmoid(BETA * (c - r))),
        "discopop": lambda c, r, sc, sr, nc, nr: (
            (1 - sigmoid(BETA * (sc - sr) / TAU)) * math.log1p(math.exp(-BETA * (sc - sr)))
            + sigmoid(BETA * (sc - sr) / TAU) * math.exp(-BETA * (sc - sr))
        ),
    }[name]
    lengths = [(p[4], p[5]) for p in pairs]
    return [per_pair(*values, *n) for *values, n in zip(rc, rr, sc, sr, lengths, strict=True)]


def expected_sequence_logprobs(batch, token_logprobs, ld_alpha):
    by_sequence = [[] for _ in range(len(batch))]
    for sequence, logprob in zip(batch.branch.tolist(), token_logprobs.tolist(), strict=True):
        by_sequence[sequence].append(logprob)
    sums = []
    for index, values in enumerate(by_sequence):
        shared = min(len(values), len(by_sequence[index ^ 1]))
        sums.append(sum(values[:shared]) + (1.0 if ld_alpha is None else ld_alpha) * sum(values[shared:]))
    return sums, by_sequence


def expected_weights(batch, scores):
    _, aligned = expected_sequence_logprobs(batch, scores.logprobs - scores.log_sum_sq_probs, None)
    weights = [math.exp(sum(values) / max(len(values), 1)) for values in aligned]
    return [weights[2 * i] * weights[2 * i + 1] for i in range(len(batch) // 2)]


def make_problem(seed=3, pairs=5, dtype=torch.float64):
    rows = random_pairs(pairs, seed=seed, longest=5, empty_prompts=True)
    batch = PreferenceCollator(0, 8, layout="packed").collate(rows)
    scores = random_scores(len(batch.targets), seed, dtype)
    references = random_scores(len(batch.targets), seed + 1, dtype).logprobs.detach()
    return batch, scores, references


def run(batch, scores, references, config):
    table = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
    ref_logprobs = table.sequence_logprobs(references, config.ld_alpha)
    return dpo_loss(scores, table, ref_logprobs, config), dpo_metrics(scores, table, ref_logprobs, config)


def all_cases():
    for name, divergence, use_weighting in itertools.product(PAIR_LOSSES, F_DIVERGENCES, (False, True)):
        if divergence != "reverse_kl" and name not in F_DIVERGENCE_LOSSES:
            continue
        if use_weighting and name.startswith("aot"):
            continue
        yield name, divergence, use_weighting


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("name, divergence, use_weighting", list(all_cases()))
def test_loss_equals_the_formula_and_its_gradient_is_right(name, divergence, ld_alpha, use_weighting):
    batch, scores, references = make_problem()
    config = DPOLossConfig(
        name, None, BETA, EPS, divergence, ALPHA_DIV, ld_alpha=ld_alpha, use_weighting=use_weighting, discopop_tau=TAU
    )
    loss, _ = run(batch, scores, references, config)

    sums, by_sequence = expected_sequence_logprobs(batch, scores.logprobs, ld_alpha)
    ref_sums, _ = expected_sequence_logprobs(batch, references, ld_alpha)
    lengths = batch.branch_lengths.tolist()
    pairs = [
        (sums[c], sums[c + 1], ref_sums[c], ref_sums[c + 1], lengths[c], lengths[c + 1], by_sequence[c])
        for c in range(0, len(batch), 2)
    ]
    per_pair = expected_pair_losses(name, pairs, divergence)
    weights = expected_weights(batch, scores) if use_weighting else [1.0] * len(per_pair)
    assert loss.item() == pytest.approx(
        statistics.fmean(map(math.prod, zip(per_pair, weights, strict=True))), rel=1e-9
    )

    if not use_weighting:  # its weights are constants to the gradient, which a numerical derivative cannot know
        scores.logprobs = scores.logprobs.detach().requires_grad_()

        def loss_of(logprobs):
            scores.logprobs = logprobs
            return run(batch, scores, references, config)[0]

        assert torch.autograd.gradcheck(loss_of, scores.logprobs)


def test_weights_carry_no_gradient():
    batch, scores, references = make_problem()
    config = DPOLossConfig("sppo_hard", beta=BETA, use_weighting=True)
    loss, _ = run(batch, scores, references, config)
    gradient = torch.autograd.grad(loss, scores.logprobs)[0]
    sums, _ = expected_sequence_logprobs(batch, scores.logprobs, None)
    ref_sums, _ = expected_sequence_logprobs(batch, references, None)
    weights = expected_weights(batch, scores)
    signs = [-1, 1]
    expected = [
        weights[s // 2] * 2 * (sums[s] - ref_sums[s] + signs[s % 2] / (2 * BETA)) / (len(batch) // 2)
        for s in batch.branch.tolist()
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))


def test_losses_combine_with_their_weights():
    batch, scores, references = make_problem()
    parts = [run(batch, scores, references, DPOLossConfig(n, beta=BETA))[0] for n in ("sigmoid", "bco_pair", "sft")]
    combined = DPOLossConfig(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5], beta=BETA)
    equal = DPOLossConfig(("sigmoid", "bco_pair", "sft"), beta=BETA)
    expected = 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2]
    torch.testing.assert_close(run(batch, scores, references, combined)[0], expected)
    torch.testing.assert_close(run(batch, scores, references, equal)[0], sum(parts))


def test_alpha_divergence_is_capped_and_has_its_limit():
    batch, scores, references = make_problem()
    reverse_kl = run(batch, scores, references, DPOLossConfig("ipo"))[0]
    near_one = DPOLossConfig("ipo", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 1e-7)
    torch.testing.assert_close(run(batch, scores, references, near_one)[0], reverse_kl)
    steep = DPOLossConfig("hinge", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=500.0)
    assert run(batch, scores, references, steep)[0].isfinite()


def test_a_batch_without_scored_tokens_gives_finite_numbers():
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}]
    batch = PreferenceCollator(0, 3).collate(rows)
    scores = random_scores(0, dtype=torch.float32)
    config = DPOLossConfig(["sigmoid", "ipo", "sft", "sigmoid_norm"], use_weighting=True)
    loss, metrics = run(batch, scores, scores.logprobs, config)
    assert loss.isfinite()
    assert all(metric.mean().isfinite() for metric in metrics.values())


def test_nothing_waits_for_the_device():
    """Meta tensors have no values: reading one on the host, or a shape that depends on one, raises."""
    batch, scores, references = make_problem()
    scores = SimpleNamespace(**{name: value.to("meta") for name, value in vars(scores).items()})
    losses = [name for name in PAIR_LOSSES if not name.startswith("aot")]
    config = DPOLossConfig(losses, label_smoothing=EPS, ld_alpha=0.5, use_weighting=True)
    loss, metrics = run(batch.to("meta"), scores, references.to("meta"), config)
    assert loss.device.type == metrics["entropy"].mean().device.type == "meta"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss_type": "sigmoidal"}, r"loss_type=\['sigmoidal'\].*sigmoid, hinge"),
        ({"loss_type": ()}, r"loss_type=\[\]: expected one or more"),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
            r"loss_weights=\[1.0\] has 1 values for the 2 losses",
        ),
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' is unknown; expected one of reverse_kl"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["sft", "nca_pair"]}, r"loss_type=\['nca_pair'\]"),
        ({"use_weighting": True, "loss_type": "aot"}, r"use_weighting=True does not apply to loss_type=\['aot'\]"),
        ({"loss_type": "exo_pair"}, r"label_smoothing=0.0: expected a number in \(0, 1\).*1e-3"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing=0.5 divides by zero"),
        ({"label_smoothing": -0.1}, r"label_smoothing: expected a finite number in \[0, 1\], got -0.1"),
        ({"ld_alpha": 1.5}, r"ld_alpha: expected a finite number in \[0, 1\] or None, got 1.5"),
        ({"beta": -1.0}, "beta: expected a finite number >= 0, got -1.0"),
        ({"beta": 0.0, "loss_type": "ipo"}, "beta=0.0: expected a positive"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau: expected a finite number > 0, got 0.0"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPOLossConfig(**arguments)


def test_robust_with_much_noise_warns_as_trl_does():
    with pytest.warns(UserWarning, match="label_smoothing=0.7"):
        DPOLossConfig("robust", label_smoothing=0.7)


def test_outputs_ask_for_no_more_than_the_loss_reads():
    assert "log_sum_sq_probs" not in DPOLossConfig().outputs
    assert "log_sum_sq_probs" in DPOLossConfig(use_weighting=True).outputs


def shares(batch, scores, references, config, table, sizes):
    """The loss as a sum of what groups of pairs give, each shown only its own tokens."""
    ref_logprobs, total, start = table.sequence_logprobs(references, config.ld_alpha), 0.0, 0
    for size in sizes:
        rows = torch.arange(start, start + size)
        own = SimpleNamespace(**{name: value[rows] for name, value in vars(scores).items()})
        total = total + dpo_loss(own, table, ref_logprobs, config, rows)
        start += size
    assert start == len(batch.targets)
    return total


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("name, divergence, use_weighting", list(all_cases()))
def test_the_shares_of_groups_of_pairs_sum_to_the_loss(name, divergence, ld_alpha, use_weighting):
    batch, scores, references = make_problem()
    config = DPOLossConfig(
        name, None, BETA, EPS, divergence, ALPHA_DIV, ld_alpha=ld_alpha, use_weighting=use_weighting, discopop_tau=TAU
    )
    assert config.is_sum_over_pairs == (not name.startswith("aot") and not (name == "sft" and use_weighting))
    if not config.is_sum_over_pairs:
        return
    table = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
    sizes = [batch.group_sizes[0], sum(batch.group_sizes[1:3]), sum(batch.group_sizes[3:])]
    whole, _ = run(batch, scores, references, config)
    parts = shares(batch, scores, references, config, table, sizes)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores.logprobs)[0] for loss in (parts, whole)))


def test_a_pair_without_scored_tokens_counts_once():
    rows = [
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5, 6]},
        {"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [5]},
        {"prompt_ids": [2], "chosen_ids": [4, 3], "rejected_ids": [5]},
    ]
    batch = PreferenceCollator(0, layout="packed").collate(rows)
    assert batch.group_sizes == (3, 0, 3)
    scores = random_scores(6, dtype=torch.float64)
    references = random_scores(6, 1, torch.float64).logprobs.detach()
    table = PreferenceLossInputs(batch.branch, batch.offset, batch.branch_lengths)
    config = DPOLossConfig("sigmoid")
    whole, _ = run(batch, scores, references, config)
    torch.testing.assert_close(shares(batch, scores, references, config, table, [3, 3]), whole)
