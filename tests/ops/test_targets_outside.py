"""Targets outside the vocabulary where nobody looks at them, as on a GPU: NaN, and the other rows are right."""

from __future__ import annotations

import importlib

import pytest
import torch

from support.heads import error, make_problem
from support.simulated_device import set_bf16_products
from trl_fast.ops import linear_cross_entropy, linear_logprob, linear_token_loss, selective_log_softmax

V = 333
OUTSIDE = {1: V, 4: -1, 5: V + 5000, 6: -(2**33)}
INSIDE = [row for row in range(8) if row not in OUTSIDE]


@pytest.fixture(autouse=True)
def _nobody_looks(monkeypatch):
    for module in ("validation", "selective_log_softmax"):
        module = importlib.import_module(f"trl_fast.ops.{module}")
        monkeypatch.setattr(module, "check_target_range", lambda *given: None)


def problem_of(dtype=torch.float32):
    problem = make_problem(8, V, dtype=dtype, temperature=1.3)
    exact = problem.logits(torch.float64).log_softmax(-1).gather(1, problem.targets[:, None]).squeeze(1)
    problem.targets = problem.targets.clone()
    for row, target in OUTSIDE.items():
        problem.targets[row] = target
    return problem, exact


def of_logprob(problem, backend):
    return linear_logprob(*vars_of(problem), backend=backend, **problem.transform).logprobs.sum()


def of_sparse(problem, backend):
    options = {"backend": backend, "head_grad": "sparse", "sparse_threshold": 1e-9}
    return linear_logprob(*vars_of(problem), **options, **problem.transform).logprobs.sum()


def of_cross_entropy(problem, backend):
    return -linear_cross_entropy(*vars_of(problem), reduction="sum", backend=backend, **problem.transform)


def of_token_loss(problem, backend):
    options = {"backend": backend, **problem.transform}
    return linear_token_loss(*vars_of(problem), lambda scores, _: scores.logprobs.sum(), **options).loss


def vars_of(problem):
    return problem.hidden, problem.weight, problem.targets


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("op", [of_logprob, of_sparse, of_cross_entropy, of_token_loss])
def test_loss_and_gradient_are_nan_for_these_rows_only(op, frozen, backend):
    if op is of_sparse and backend == "triton":
        pytest.skip("Triton has no kernels of the sparse gradient")
    problem, exact = problem_of()
    (true,) = torch.autograd.grad(exact.sum(), problem.hidden)
    problem.weight.requires_grad_(not frozen)
    loss = op(problem, backend)
    loss.backward()
    assert loss.isnan() and (frozen or problem.weight.grad.isnan().any())
    assert problem.hidden.grad[list(OUTSIDE)].isnan().all()
    assert error(problem.hidden.grad[INSIDE], true[INSIDE]) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_without_a_gradient(dtype, backend, monkeypatch):
    """In bfloat16 also by the fused kernel, which Triton's backend takes."""
    set_bf16_products(monkeypatch, True)
    problem, exact = problem_of(dtype)
    with torch.no_grad():
        scores = linear_logprob(
            *vars_of(problem), outputs=("entropy", "is_top1"), backend=backend, **problem.transform
        )
    assert scores.logprobs[list(OUTSIDE)].isnan().all() and not scores.is_top1[list(OUTSIDE)].any()
    assert scores.entropy[list(OUTSIDE)].isnan().all() and scores.entropy[INSIDE].isfinite().all()
    assert error(scores.logprobs[INSIDE], exact[INSIDE]) < 1e-2


def test_selective(backend):
    problem, exact = problem_of()
    logits = problem.logits().detach().requires_grad_()
    logprobs = selective_log_softmax(logits, problem.targets, backend=backend)
    logprobs.sum().backward()
    assert logprobs[list(OUTSIDE)].isnan().all() and logits.grad[list(OUTSIDE)].isnan().all()
    assert error(logprobs[INSIDE], exact[INSIDE]) < 1e-6 and logits.grad[INSIDE].isfinite().all()
