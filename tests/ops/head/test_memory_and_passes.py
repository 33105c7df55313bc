"""Holds the cost of the head: never [N, vocab] beyond one row block, and the design's count of passes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import measure_peak
from support.heads import error, make_problem
from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss
from trl_fast.ops.backends import load_extension
from trl_fast.ops.head.plan import row_bytes
from trl_fast.ops.head.row_kernels import ROW_KERNELS

N, V, H = 512, 8192, 16
WHOLE = N * V * 4
WEIGHT = V * H * 4


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    return request.param


def logprob_step(backend, workspace_bytes, frozen=()):
    problem = make_problem(N, V, H)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)

    def step():
        options = {"workspace_bytes": workspace_bytes, "backend": backend, "outputs": ("entropy",)}
        loss = linear_logprob(problem.hidden, problem.weight, problem.targets, **options).logprobs.sum()
        if loss.requires_grad:
            loss.backward()

    return step


def cross_entropy_step(backend, workspace_bytes):
    problem = make_problem(N, V, H)

    def step():
        linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, workspace_bytes=workspace_bytes, backend=backend
        ).backward()

    return step


def token_loss_step(backend, workspace_bytes, frozen=()):
    problem = make_problem(N, V, H)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)

    def step():
        given = (problem.hidden, problem.weight, problem.targets, lambda scores, rows: scores.logprobs.square().sum())
        loss = linear_token_loss(*given, workspace_bytes=workspace_bytes, backend=backend).loss
        if loss.requires_grad:
            loss.backward()

    return step


@pytest.mark.parametrize("step", [logprob_step, token_loss_step])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "weight")], ids=["trained", "frozen", "scoring"])
def test_step_stays_inside_its_workspace(step, frozen, backend):
    workspace = WHOLE // 8
    peak = measure_peak(step(backend, workspace, frozen)).peak_bytes
    # Beside the workspace: the weight's gradient, and some [N, H] and [N] vectors.
    allowed = workspace + (0 if frozen else 2 * WEIGHT) + 4 * N * H * 4 + 40 * N * 4
    assert peak < allowed < WHOLE // 2


def test_cross_entropy_stays_inside_its_workspace(backend):
    workspace = WHOLE // 8
    peak = measure_peak(cross_entropy_step(backend, workspace)).peak_bytes
    # The gradient is scaled into a second tensor in backward.
    assert peak < workspace + 2 * WEIGHT + 5 * N * H * 4 + 40 * N * 4 < WHOLE // 2


def test_scoring_keeps_nothing(backend):
    problem = make_problem(N, V, H)

    def score():
        with torch.no_grad():
            return linear_logprob(problem.hidden, problem.weight, problem.targets, backend=backend)

    scores = score()
    assert scores.logprobs.grad_fn is None
    live = measure_peak(lambda: [score() for _ in range(8)]).peak_bytes
    once = measure_peak(score).peak_bytes
    assert live < once + 8 * 10 * N * 4


# 130 rows in blocks of 75: the last block is smaller, and would choose wider tiles for itself.
RAGGED = dict(n=130, v=3000, h=8)


@pytest.mark.parametrize("op", ["cross-entropy", "token loss", "logprob", "sparse"])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_and_tiles_of_different_sizes(op, bias, backend):
    problem = make_problem(**RAGGED, bias=bias)
    given = (problem.hidden, problem.weight, problem.targets)
    options = {"bias": problem.bias, "workspace_bytes": 100 * row_bytes(3000, torch.float32, ROW_KERNELS[backend])}
    options["backend"] = backend
    if op == "cross-entropy":
        loss = linear_cross_entropy(*given, reduction="sum", **options)
    elif op == "token loss":
        loss = linear_token_loss(*given, lambda scores, rows: -scores.logprobs.sum(), **options).loss
    elif op == "logprob":
        loss = -linear_logprob(*given, **options).logprobs.sum()
    else:
        loss = -linear_logprob(*given, **options, head_grad="sparse", sparse_threshold=1e-30).logprobs.sum()
    got = torch.autograd.grad(loss, problem.leaves)
    exact = torch.nn.functional.cross_entropy(problem.logits(torch.float64), problem.targets, reduction="sum")
    assert error(loss, exact) < 1e-5
    for grad, wanted in zip(got, torch.autograd.grad(exact, problem.leaves), strict=True):
        assert error(grad, wanted) < 1e-5


def sequence_loss_step(backend, group_size, frozen=()):
    """Groups in whose loss the rows' weights depend on one another."""
    problem = make_problem(N, V, H)
    for name in frozen:
        getattr(problem, name).requires_grad_(False)

    def loss(scores, rows):
        return scores.logprobs.view(-1, group_size).sum(1).square().sum()

    def step():
        given = (problem.hidden, problem.weight, problem.targets, loss)
        options = {"workspace_bytes": WHOLE // 8, "backend": backend, "group_sizes": [group_size] * (N // group_size)}
        linear_token_loss(*given, **options).loss.backward()

    return step


class CountedProducts:
    """Sums the multiply-adds of the matrix products that the head issues."""

    def __init__(self, monkeypatch):
        self.flops = 0
        assert load_extension().ok
        mm, addmm_, product = torch.mm, torch.Tensor.addmm_, torch.ops.trl_fast.product

        def counted_mm(left, right, **kwargs):
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            return mm(left, right, **kwargs)

        def counted_addmm_(total, left, right):
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            return addmm_(total, left, right)

        def counted_product(left, right, out, accumulate):
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
            product(left, right, out, accumulate)

        monkeypatch.setattr(torch, "mm", counted_mm)
        monkeypatch.setattr(torch.ops.trl_fast, "product", counted_product)
        monkeypatch.setattr(torch.Tensor, "addmm_", counted_addmm_)

    @property
    def passes(self) -> float:
        return self.flops / (2 * N * V * H)


@pytest.mark.parametrize(
    ("step", "passes"),
    [
        (lambda b: logprob_step(b, None, ("hidden", "weight")), 1),
        (lambda b: logprob_step(b, WHOLE // 8, ("hidden", "weight")), 1),
        (lambda b: logprob_step(b, WHOLE // 8, ("weight",)), 2),
        (lambda b: logprob_step(b, None), 3),
        (lambda b: logprob_step(b, WHOLE // 8), lambda b: 4 - kept_share(b, WHOLE // 8)),
        (lambda b: cross_entropy_step(b, WHOLE // 8), 3),
        (lambda b: token_loss_step(b, WHOLE // 8, ("hidden", "weight")), 1),
        (lambda b: token_loss_step(b, WHOLE // 8, ("weight",)), 2),
        (lambda b: token_loss_step(b, WHOLE // 8), 3),
        (lambda b: sequence_loss_step(b, 4), 3),
        (lambda b: sequence_loss_step(b, 4, ("weight",)), 2),
        (lambda b: sequence_loss_step(b, N), lambda b: 4 - kept_share(b, WHOLE // 8)),
        (lambda b: sequence_loss_step(b, N, ("weight",)), 2),
    ],
    ids=[
        "scoring",
        "scoring in blocks",
        "frozen head",
        "kept logits",
        "logits beyond the workspace",
        "cross-entropy",
        "token loss, no gradient",
        "token loss, frozen head",
        "token loss",
        "sequence loss, sequences that fit",
        "sequence loss, sequences that fit, frozen head",
        "sequence loss, a sequence beyond the workspace",
        "sequence loss, a sequence beyond the workspace, frozen head",
    ],
)
def test_passes_over_the_head(step, passes, backend, monkeypatch):
    count = CountedProducts(monkeypatch)
    step(backend)()
    # Of kept rows, a part of the last tile more or less.
    assert count.passes == (pytest.approx(passes(backend), abs=2.5 / N) if callable(passes) else passes)


def kept_share(backend, workspace_bytes):
    """The share of rows whose logits may fill three quarters of the workspace; the others are computed again."""
    return 3 * workspace_bytes // 4 // row_bytes(V, torch.float32, ROW_KERNELS[backend]) / N


def partly_weighted_step(backend, zero_rows, keep):
    """A loss that gives no gradient to some rows."""
    problem = make_problem(N, V, H)
    weights = torch.ones(N)
    weights[:zero_rows] = 0

    def step():
        workspace = 16 * WHOLE if keep else WHOLE // 8
        scores = linear_logprob(
            problem.hidden, problem.weight, problem.targets, workspace_bytes=workspace, backend=backend
        )
        (scores.logprobs * weights).sum().backward()
        return problem.hidden.grad, problem.weight.grad

    return step


@pytest.mark.parametrize("keep", [True, False])
def test_rows_without_a_gradient_leave_before_the_products(keep, backend, monkeypatch):
    count = CountedProducts(monkeypatch)
    hidden, weight = partly_weighted_step(backend, N // 4, keep)()
    assert count.passes == 1 + (2 if keep else 3) * 3 / 4
    assert (hidden[: N // 4] == 0).all() and (hidden[N // 4 :] != 0).any()
    exact = make_problem(N, V, H)
    logp = exact.logits(torch.float64).log_softmax(-1).gather(1, exact.targets[:, None])[N // 4 :]
    wanted = torch.autograd.grad(logp.sum(), (exact.hidden, exact.weight))
    torch.testing.assert_close(hidden, wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight, wanted[1], rtol=1e-3, atol=1e-4)
