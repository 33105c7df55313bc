"""A vocabulary that is dealt to several processes: merged states are those of the whole sweep, and so is every op."""

from __future__ import annotations

import pytest
import torch
import torch.distributed

from support.heads import make_problem
from support.ranks import run_on_ranks
from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from trl_fast.ops.head.row_kernels import row_scores_reference
from trl_fast.ops.head.row_statistics import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS, NUM_STATES
from trl_fast.ops.head.sweep import finish_scores, new_state
from trl_fast.ops.head.vocabulary_shard import VocabularyShard, merge_states

INF, NAN = float("inf"), float("nan")
EVERYTHING = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1
OUTPUTS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
COLUMNS = 40
# Even, uneven, a single column at either end and in the middle, and every column alone.
CUTS = [(0, 20, 40), (0, 7, 31, 40), (0, 1, 20, 21, 39, 40), tuple(range(41))]


def state_of(logits, targets, first=0):
    state = new_state(len(logits), logits.device)
    row_scores_reference(logits, targets - first, None, 1.0, 0.0, 1.0, EVERYTHING, 0, state)
    return state


def nasty_rows(dtype):
    """A target in each column, then ties at the top, equal logits, an offset, -inf, +inf and NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(COLUMNS + 12, COLUMNS, generator=generator, dtype=torch.float64)
    targets = torch.cat((torch.arange(COLUMNS), torch.tensor([3, 30, 5, 5, 0, 39, 10, 10, 10, 12, 12, 25])))
    ties = logits[COLUMNS:]
    ties[0, [3, 30]] = ties[1, [3, 30]] = 9.0  # the target is the first of the largest, and it is the second
    ties[2] = 1.5
    ties[3] += 1e4
    ties[4, 1:] = ties[5, :-1] = -INF  # nothing but the target
    ties[6] = -INF
    ties[7, :21] = -INF  # whole shards, the target's among them
    ties[8, 11] = INF
    ties[9, 12] = INF
    ties[10, 12] = NAN
    ties[11, 3] = NAN
    return logits.to(dtype), targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cuts", CUTS, ids=lambda cuts: f"{len(cuts) - 1} parts")
def test_merged_states_are_those_of_the_whole_sweep(cuts, dtype):
    logits, targets = nasty_rows(dtype)
    parts = [state_of(logits[:, a:b], targets, a) for a, b in zip(cuts, cuts[1:], strict=False)]
    states = torch.stack(parts)
    before = states.clone()
    whole = finish_scores(state_of(logits, targets), EVERYTHING, COLUMNS, torch.float64)
    for order in (states, states.flip(0)):
        merged = finish_scores(merge_states(order), EVERYTHING, COLUMNS, torch.float64)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(merged, whole, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(states.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_merge_of_one_part_changes_no_bit():
    logits, targets = nasty_rows(torch.float32)
    state = state_of(logits, targets)
    finite = state.isfinite().all(dim=0)
    assert finite.sum() > COLUMNS
    assert torch.equal(merge_states(state[None])[:, finite], state[:, finite])
    assert state.shape[0] == NUM_STATES


# ---- two processes


VOCAB, ROWS = 531, 37
TRANSFORMS = [{}, {"temperature": 0.7, "softcap": 20.0, "logit_scale": 0.5, "bias": True}]
PAIRS, SIZES = 6, (3, 5, 2, 4, 6, 1, 3, 3, 2, 4, 1, 3)


def scored(hidden, weight, targets, given):
    scores = linear_logprob(hidden, weight, targets, outputs=OUTPUTS, **given)
    loss = (scores.logprobs * torch.arange(ROWS)).sum() + scores.entropy.square().sum()
    return loss, *(getattr(scores, name).detach().float() for name in OUTPUTS)


def only_logprobs(hidden, weight, targets, given):
    return (linear_logprob(hidden, weight, targets, **given).logprobs.square().sum(),)


def weighted(hidden, weight, targets, given):
    """A loss of rows, some of which have no gradient and leave."""
    weights = torch.arange(ROWS) % 3

    def token_loss(scores, rows):
        return (weights[rows] * (scores.logprobs + scores.entropy.square())).sum()

    given = {**given, "outputs": ("logprobs", "entropy")}
    loss, scores = linear_token_loss(hidden, weight, targets, token_loss, **given)
    return loss, scores.logprobs, scores.entropy


def preferred(hidden, weight, targets, given):
    """A loss of pairs, whose rows are scored together."""
    branch = torch.arange(2 * PAIRS).repeat_interleave(torch.tensor(SIZES))
    reference = torch.linspace(-9.0, -5.0, 2 * PAIRS)

    def token_loss(scores, rows):
        sums = torch.zeros(2 * PAIRS).index_add(0, branch[rows], scores.logprobs) - reference
        pairs = (branch[rows] // 2).unique()
        return -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2]))[pairs].sum()

    groups = [a + b for a, b in zip(SIZES[0::2], SIZES[1::2], strict=True)]
    loss, scores = linear_token_loss(hidden, weight, targets, token_loss, group_sizes=groups, **given)
    return loss, scores.logprobs


def cross_entropy(hidden, weight, targets, given):
    targets = targets.where(torch.arange(ROWS) % 5 > 0, -100)
    return (linear_cross_entropy(hidden, weight, targets, **given),)


def row_losses(hidden, weight, targets, given):
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none", **given)
    return losses.sum(), losses.detach()


def losses(shard_of, backend, transform):
    """Every op's results and gradients on the columns that `shard_of` gives; those of weight and bias are of these."""
    problem = make_problem(ROWS, VOCAB, 24, seed=3, **transform)
    columns, shard = shard_of(VOCAB)
    found = {}

    def record(name, function, frozen=False, **options):
        hidden = problem.hidden.detach().clone().requires_grad_()
        weight = problem.weight.detach()[columns].clone().requires_grad_(not frozen)
        bias = None if problem.bias is None else problem.bias.detach()[columns].clone().requires_grad_(not frozen)
        given = {"bias": bias, "backend": backend, "shard": shard, **problem.transform, **options}
        loss, *more = function(hidden, weight, problem.targets, given)
        loss.backward()
        leaves = [hidden] if frozen else [hidden, weight] + ([] if bias is None else [bias])
        found[name] = [loss.detach(), *more], [leaf.grad for leaf in leaves]

    smooth = {"label_smoothing": 0.1, "z_loss": 1e-3}
    # Room for a few rows of logits: several blocks, and logits that are computed again.
    narrow = {"workspace_bytes": 16 * 4 * VOCAB}
    for name, function in (("scores", scored), ("token loss", weighted), ("pairs", preferred)):
        record(name, function)
        record(f"{name}, narrow", function, **narrow)
        record(f"{name}, frozen", function, frozen=True)
    record("log-probs, frozen", only_logprobs, frozen=True)
    record("cross-entropy", cross_entropy, **narrow)
    record("cross-entropy, smooth", cross_entropy, **smooth)
    record("cross-entropy, rows", row_losses, **smooth)
    return found


def whole(_):
    return slice(None), None


def dealt(vocab_size):
    """The columns of a rank, unevenly: the first has 200 of them."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    first, last = ((0, 200), (200, vocab_size))[torch.distributed.get_rank()]
    group = torch.distributed.group.WORLD.group_name
    return slice(first, last), VocabularyShard(first, vocab_size, vocab_size - 200, group)


def every_case():
    return [losses(dealt, backend, transform) for backend in ("torch", "cpp") for transform in TRANSFORMS]


@pytest.mark.usefixtures("extension")
def test_two_processes_score_as_one():
    ranks = run_on_ranks(every_case, engine=None)
    cases = [losses(whole, backend, transform) for backend in ("torch", "cpp") for transform in TRANSFORMS]
    for expected, *found in zip(cases, *ranks, strict=True):
        for name, (values, (hidden, *own)) in expected.items():
            for rank, mine in enumerate(found):
                got, (grad_hidden, *grad_own) = mine[name]
                torch.testing.assert_close(got, values, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
                assert all(torch.equal(a, b) for a, b in zip(got, found[0][name][0], strict=True)), name
                assert torch.equal(grad_hidden, found[0][name][1][0]), name
                columns = (slice(0, 200), slice(200, VOCAB))[rank]
                for a, b in ((grad_hidden, hidden), *zip(grad_own, (x[columns] for x in own), strict=True)):
                    error = (a - b).norm() / b.norm()
                    assert error < 2e-6, f"{name}: {error}"


def test_what_a_shard_has_no_place_for_is_refused():
    problem = make_problem(3, 40)
    given = (problem.hidden, problem.weight[:20], problem.targets % 20)
    shard = VocabularyShard(20, 40, 20, "a group")
    with pytest.raises(ValueError, match="head_grad='sparse' is not there for a head .*; use head_grad='exact'"):
        linear_logprob(*given, shard=shard, head_grad="sparse")
    with pytest.raises(ValueError, match=r"targets: row 1 is 40, outside the head's vocabulary \[0, 40\)"):
        linear_logprob(*given[:2], torch.tensor([0, 40, 1]), shard=shard)
    with pytest.raises(
        ValueError, match="shard: .*a weight of 20 columns .* from 30 of 40 where a process has at most"
    ):
        linear_logprob(*given, shard=shard._replace(first=30))
