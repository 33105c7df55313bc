"""linear_token_loss on every backend against the same loss of whole float64 logits."""

from __future__ import annotations

import pytest
import torch

from support.heads import DTYPES, FLOOR, HeadProblem, assert_as_good, error, make_problem, scores_from_logits
from trl_fast.ops import TokenScores, linear_cross_entropy, linear_token_loss
from trl_fast.ops.head import gradients

# Bytes that hold a few rows of 333 logits, and one of the PyTorch kernels, which have temporaries.
ROW_BLOCKS = 12_000
N = 21
ADVANTAGES = torch.linspace(-1.0, 1.0, N)
OLD_LOGPROBS = torch.linspace(-7.0, -3.0, N)


def clipped_policy_loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
    """The PPO-clip objective (arXiv 1707.06347, eq. 7): rows on the far side of the clip have no gradient."""
    ratio = (scores.logprobs - OLD_LOGPROBS[rows].to(scores.logprobs.dtype)).exp()
    advantages = ADVANTAGES[rows].to(ratio.dtype)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / N


def with_entropy_bonus(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
    return clipped_policy_loss(scores, rows) - 0.1 * scores.entropy.sum()


def dft(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
    """DFT (arXiv 2508.05629, eq. 9): the likelihood, weighted by the probability itself."""
    return -(scores.logprobs * scores.logprobs.detach().exp()).sum()


LOSSES = {"clipped": clipped_policy_loss, "entropy bonus": with_entropy_bonus, "dft": dft}


def whole(problem: HeadProblem, token_loss, dtype: torch.dtype | None) -> torch.Tensor:
    scores = scores_from_logits(problem.logits(dtype), problem.targets)
    return token_loss(TokenScores(**scores), torch.arange(len(problem.targets)))


def fused(problem: HeadProblem, token_loss, backend: str, **options) -> torch.Tensor:
    given = (problem.hidden, problem.weight, problem.targets, token_loss)
    options = {"outputs": ("logprobs", "entropy"), "bias": problem.bias, "backend": backend} | options
    return linear_token_loss(*given, **problem.transform, **options).loss


def make(dtype: torch.dtype = torch.float32) -> HeadProblem:
    return make_problem(N, 333, dtype=dtype, bias=True, softcap=9.0, logit_scale=0.5, temperature=1.3)


@pytest.mark.parametrize("workspace_bytes", [None, ROW_BLOCKS], ids=["one block", "row blocks"])
@pytest.mark.parametrize("token_loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype, token_loss, workspace_bytes, backend):
    problem = make(dtype)
    got = fused(problem, token_loss, backend, workspace_bytes=workspace_bytes)
    exact, baseline = whole(problem, token_loss, torch.float64), whole(problem, token_loss, None)
    assert got.dtype == torch.float32
    assert_as_good(got, baseline, exact, "loss", 4 * FLOOR[dtype])
    grads = (torch.autograd.grad(loss, problem.leaves) for loss in (got, baseline, exact))
    for leaf, a, b, c in zip(("hidden", "weight", "bias"), *grads, strict=True):
        assert a.dtype == dtype
        assert_as_good(a, b, c, f"gradient of {leaf}", 10 * FLOOR[dtype])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_parts_and_retained_graph(frozen, backend):
    problem = make()
    getattr(problem, frozen).requires_grad_(False)
    leaves = [x for x in problem.leaves if x.requires_grad]
    loss = fused(problem, with_entropy_bonus, backend, workspace_bytes=ROW_BLOCKS)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(-2 * loss, leaves)
    true = torch.autograd.grad(whole(problem, with_entropy_bonus, torch.float64), leaves)
    for a, b, c in zip(first, second, true, strict=True):
        assert error(a, c) < 5e-6 and error(b, -2 * c) < 5e-6


@pytest.mark.parametrize("workspace_bytes", [None, ROW_BLOCKS], ids=["one block", "row blocks"])
def test_rows_without_a_gradient_leave_before_the_products(workspace_bytes, backend, monkeypatch):
    rows_added = []
    monkeypatch.setattr(gradients.HeadGradients, "_sweep", spied(gradients.HeadGradients._sweep, rows_added))
    problem = make()
    active = torch.zeros(N, dtype=torch.bool)
    active[[1, 4, 5, 20]] = True

    def masked(scores, rows):
        return (scores.logprobs * active[rows]).sum()

    fused(problem, masked, backend, workspace_bytes=workspace_bytes).backward()
    true = torch.autograd.grad(whole(problem, masked, torch.float64), problem.leaves)
    assert sum(rows_added) == 4
    assert (problem.hidden.grad[~active] == 0).all()
    for leaf, exact in zip(problem.leaves, true, strict=True):
        assert error(leaf.grad, exact) < 5e-6


GROUPS = (3, 0, 5, 1, 2, 9, 1)


def pairwise(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
    """A loss that is not a sum over tokens: one logistic loss a group, on the sum of its log-probs."""
    group = torch.arange(len(GROUPS)).repeat_interleave(torch.tensor(GROUPS))[rows]
    whole = torch.zeros(len(GROUPS), dtype=scores.logprobs.dtype).index_add(0, group, scores.logprobs + 4.0)
    present = torch.zeros(len(GROUPS)).index_fill(0, group, 1.0).bool()
    return torch.where(present, torch.nn.functional.softplus(-whole), 0.0).sum()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", None])
@pytest.mark.parametrize("workspace_bytes", [None, ROW_BLOCKS, 4 * ROW_BLOCKS])
def test_groups_are_seen_whole_and_have_exact_gradients(frozen, workspace_bytes, backend):
    problem = make()
    if frozen:
        getattr(problem, frozen).requires_grad_(False)
    leaves = [x for x in problem.leaves if x.requires_grad]
    borders = {0, *torch.tensor(GROUPS).cumsum(0).tolist()}

    def checked(scores, rows):
        assert int(rows[0]) in borders and int(rows[-1]) + 1 in borders
        return pairwise(scores, rows)

    loss = fused(problem, checked, backend, workspace_bytes=workspace_bytes, group_sizes=GROUPS)
    exact = whole(problem, pairwise, torch.float64)
    assert error(loss, exact) < 2e-6
    grads = (torch.autograd.grad(value, leaves) for value in (loss, exact))
    for got, true in zip(*grads, strict=True):
        assert error(got, true) < 5e-6


@pytest.mark.parametrize("sizes", [(3, 4), (N + 1, -1)])
def test_groups_that_are_not_the_rows_are_refused(sizes):
    with pytest.raises(ValueError, match="group_sizes: expected numbers of rows that sum to the 21 of hidden, got"):
        fused(make(), pairwise, "torch", group_sizes=sizes)


def test_scores_come_back_whole_and_detached(backend):
    problem = make()
    outputs = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    seen = []

    def record(scores, rows):
        seen.append(rows)
        return scores.logprobs.sum()

    options = {"bias": problem.bias, "outputs": outputs, "workspace_bytes": ROW_BLOCKS, "backend": backend}
    got = linear_token_loss(
        problem.hidden, problem.weight, problem.targets, record, **problem.transform, **options
    ).scores
    assert len(seen) > 1 and torch.equal(torch.cat(seen), torch.arange(N))
    for name, exact in scores_from_logits(problem.logits(torch.float64), problem.targets).items():
        assert not getattr(got, name).requires_grad
        assert error(getattr(got, name).double(), exact.double()) < 2e-6


def test_without_gradients_nothing_is_kept(backend, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed without need")

    monkeypatch.setattr(gradients.HeadGradients, "add", refuse)
    problem = make()
    with torch.no_grad():
        loss = fused(problem, with_entropy_bonus, backend)
    assert not loss.requires_grad
    assert error(loss, whole(problem, with_entropy_bonus, torch.float64)) < 2e-6


@pytest.mark.parametrize("rows", [0, 4], ids=["no rows", "a loss of nothing"])
def test_nothing_to_train_on_is_a_differentiable_zero(rows, backend):
    problem = make_problem(rows, 60)
    loss = fused(problem, lambda scores, rows: scores.logprobs.new_zeros(()), backend)
    assert loss.item() == 0.0
    loss.backward()
    assert problem.hidden.grad.abs().sum() == 0 and problem.weight.grad.abs().sum() == 0


def test_under_autocast_the_weight_may_be_wider(backend):
    problem = make_problem(N, 90)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fused(problem, dft, backend)
    loss.backward()
    assert problem.weight.grad.dtype == torch.float32
    assert error(loss, whole(problem, dft, torch.float64)) < 1e-2


def test_the_likelihood_is_cross_entropy(backend):
    problem = make_problem(N, 90)
    loss = fused(problem, lambda scores, rows: -scores.logprobs.sum(), backend)
    true = linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum", backend=backend)
    assert torch.equal(loss, true)


@pytest.mark.parametrize(
    ("token_loss", "got"),
    [
        (lambda s, rows: s.logprobs, r"shape \(4,\)"),
        (lambda s, rows: None, "NoneType"),
        (lambda s, rows: 1.0, "float"),
    ],
)
def test_a_loss_that_is_not_summed_is_refused(token_loss, got):
    problem = make_problem(4, 30)
    with pytest.raises(ValueError, match=f"token_loss: expected a summed loss, a 0-d tensor, got {got}"):
        fused(problem, token_loss, "torch")


@pytest.mark.parametrize("trained", [True, False])
def test_a_retained_graph_has_the_same_gradients_again(trained, backend):
    """Gradients are scaled where they lie, but not while another backward pass may ask for them."""
    problem = make()
    problem.weight.requires_grad_(trained)
    leaves = [leaf for leaf in problem.leaves if leaf.requires_grad]
    loss = fused(problem, dft, backend)
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("skip", [True, False])
def test_rows_without_a_gradient_leave_only_if_asked(skip, backend, monkeypatch):
    problem = make()
    counted = torch.arange(N) % 3 == 0

    def masked(scores, rows):
        return -(scores.logprobs * counted[rows]).sum()

    seen = []
    monkeypatch.setattr(gradients.HeadGradients, "_sweep", spied(gradients.HeadGradients._sweep, seen))
    loss = fused(problem, masked, backend, outputs=("logprobs",), skip_zero_rows=skip)
    assert sum(seen) == (int(counted.sum()) if skip else N)
    exact = whole(problem, masked, torch.float64)
    grads = [torch.autograd.grad(x, problem.leaves) for x in (loss, exact)]
    assert all(error(ours, true) < 1e-5 for ours, true in zip(*grads, strict=True))


def spied(sweep, seen):
    def spy(self, row_blocks, last):
        seen.append(sum(len(block.targets) for block in row_blocks))
        return sweep(self, row_blocks, last)

    return spy
