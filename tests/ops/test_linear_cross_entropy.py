"""linear_cross_entropy on every backend against torch.nn.functional.cross_entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from support.heads import DTYPES, FLOOR, HeadProblem, assert_as_good, error, make_problem
from trl_fast.ops import linear_cross_entropy
from trl_fast.ops.linear_cross_entropy import _linear_cross_entropy

# Bytes that hold a few rows of 333 logits, and one of the PyTorch kernels, which have temporaries.
ROW_BLOCKS = 12_000


def reference(
    problem: HeadProblem,
    dtype: torch.dtype | None,
    *,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    num_items=None,
) -> torch.Tensor:
    u = problem.logits(dtype)
    losses = F.cross_entropy(u, problem.targets, label_smoothing=label_smoothing, reduction="none")
    losses = losses + z_loss * torch.logsumexp(u, -1).square() * (problem.targets != -100)
    if reduction == "none":
        return losses
    divisor = num_items or (max(int((problem.targets != -100).sum()), 1) if reduction == "mean" else 1)
    return losses.sum() / divisor


def run(problem: HeadProblem, backend: str, **options) -> torch.Tensor:
    return linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        backend=backend,
        **problem.transform,
        **options,
    )


OPTIONS = {
    "plain": {},
    "smoothed": dict(label_smoothing=0.1),
    "z loss": dict(z_loss=1e-2),
    "both": dict(label_smoothing=0.3, z_loss=1e-3),
    "sum": dict(reduction="sum", label_smoothing=0.1),
    "num_items": dict(reduction="sum", num_items=40),
    "none": dict(reduction="none", label_smoothing=0.1, z_loss=1e-3),
}


@pytest.mark.parametrize("workspace_bytes", [None, ROW_BLOCKS], ids=["one block", "row blocks"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype, options, workspace_bytes, backend):
    problem = make_problem(21, 333, dtype=dtype, bias=True, softcap=9.0, logit_scale=0.5, temperature=1.3)
    problem.targets[[2, 3, 17]] = -100
    got = run(problem, backend, workspace_bytes=workspace_bytes, **options)
    exact, baseline = reference(problem, torch.float64, **options), reference(problem, None, **options)
    assert got.dtype == torch.float32
    assert_as_good(got, baseline, exact, "loss", FLOOR[dtype])
    weights = torch.linspace(0.5, 1.5, got.numel()).view(got.shape)

    def gradients(loss):
        return torch.autograd.grad((loss * weights.to(loss.dtype)).sum(), problem.leaves)

    for leaf, a, b, c in zip(
        ("hidden", "weight", "bias"), gradients(got), gradients(baseline), gradients(exact), strict=True
    ):
        assert a.dtype == dtype
        assert_as_good(a, b, c, f"gradient of {leaf}", 10 * FLOOR[dtype])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", ["none at all", "all ignored"])
def test_nothing_to_train_on_is_a_differentiable_zero(rows, reduction, backend):
    problem = make_problem(0 if rows == "none at all" else 4, 60)
    problem.targets.fill_(-100)
    loss = run(problem, backend, reduction=reduction).sum()
    assert loss.item() == 0.0
    loss.backward()
    assert problem.hidden.grad.abs().sum() == 0 and problem.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts_and_retained_graph(frozen, backend):
    problem = make_problem(8, 90)
    getattr(problem, frozen).requires_grad_(False)
    leaf = next(x for x in problem.leaves if x.requires_grad)
    loss = run(problem, backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, leaf)
    (true,) = torch.autograd.grad(reference(problem, torch.float64), leaf)
    assert torch.equal(first, kept)
    assert error(first, true) < 2e-6 and error(second, 3 * true) < 2e-6


def test_no_gradient_is_taken_without_need(backend, monkeypatch):
    problem = make_problem(8, 90)
    from trl_fast.ops.head import gradients

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed under no_grad")

    monkeypatch.setattr(gradients.HeadGradients, "add", refuse)
    with torch.no_grad():
        loss = run(problem, backend)
    assert error(loss, reference(problem, torch.float64)) < 1e-6


def test_opcheck(backend):
    if backend == "triton":
        pytest.skip("the interpreter reads pointers, which fake tensors do not have; the same op is checked on cpp")
    problem = make_problem(5, 33, bias=True)
    args = (problem.hidden, problem.weight, problem.targets, problem.bias, torch.tensor(2.0), 1.0, 0.0, 1.0, 0.1, 1e-3)
    torch.library.opcheck(_linear_cross_entropy, (*args, True, True, True, 1 << 20, backend))


def test_shapes_of_float16_gradients_that_wait():
    problem = make_problem(5, 33, dtype=torch.float16, bias=True)
    args = (problem.hidden, problem.weight, problem.targets, problem.bias, torch.tensor(2.0), 1.0, 0.0, 1.0, 0.1, 1e-3)
    given = (*args, True, True, True, 1 << 20, "torch")
    torch.library.opcheck(_linear_cross_entropy, given, test_utils=("test_schema", "test_faketensor"))
