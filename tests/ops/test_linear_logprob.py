"""linear_logprob on every backend: against float64, and as good as plain PyTorch in the same dtype."""

from __future__ import annotations

import pytest
import torch

from support.heads import (
    DTYPES,
    FLOOR,
    HeadProblem,
    assert_as_good,
    error,
    make_problem,
    scores_from_logits,
)
from trl_fast.ops import linear_logprob
from trl_fast.ops.head.autograd import linear_scores, linear_scores_backward

ALL_OUTPUTS = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

SHAPES = {
    "plain": dict(n=13, v=257),
    "one row": dict(n=1, v=1000),
    "zero rows": dict(n=0, v=130),
    "one word": dict(n=3, v=1),
    "vocabulary beyond one tile": dict(n=6, v=5003),
    "bias": dict(n=9, v=300, bias=True),
    "offset 1e4": dict(n=9, v=300, offset=1e4),
    "temperature": dict(n=9, v=300, temperature=0.6),
    "softcap": dict(n=9, v=300, softcap=5.0),
    "scale": dict(n=9, v=300, logit_scale=0.125),
    "all": dict(n=9, v=300, bias=True, softcap=8.0, logit_scale=0.5, temperature=1.7),
    "peaked": dict(n=9, v=300, spread=20.0),
}


def run(problem: HeadProblem, backend: str, outputs=ALL_OUTPUTS, workspace_bytes=None):
    return linear_logprob(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        outputs=outputs,
        workspace_bytes=workspace_bytes,
        backend=backend,
        **problem.transform,
    )


def reference(problem: HeadProblem, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    return scores_from_logits(problem.logits(dtype), problem.targets)


def gradients(loss: torch.Tensor, problem: HeadProblem) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, problem.leaves, retain_graph=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_outputs_and_gradients(shape, dtype, backend):
    problem = make_problem(**shape, dtype=dtype)
    got, exact, baseline = run(problem, backend), reference(problem, torch.float64), reference(problem, None)
    floor = FLOOR[dtype]
    for name in ("logprobs", "entropy", "log_sum_sq_probs", "mean_logits"):
        value = getattr(got, name)
        assert value.dtype == torch.float32 and value.shape == problem.targets.shape
        assert_as_good(value, baseline[name], exact[name], name, floor)
    if dtype == torch.float32 and not shape.get("offset"):
        assert torch.equal(got.is_top1, exact["is_top1"])
    upstream = torch.linspace(-1, 1, max(problem.targets.numel(), 1))[: problem.targets.numel()]

    def loss(scores):
        logprobs, entropy = scores["logprobs"], scores["entropy"]
        return (logprobs * upstream.to(logprobs.dtype)).sum() + (entropy * upstream.to(entropy.dtype).flip(0)).sum()

    ours = gradients(loss({"logprobs": got.logprobs, "entropy": got.entropy}), problem)
    true, plain = gradients(loss(exact), problem), gradients(loss(baseline), problem)
    # The float64 graph rounds its gradients to the leaves' dtype at the end, so half a unit of that dtype is free.
    for leaf, a, b, c in zip(("hidden", "weight", "bias"), ours, plain, true, strict=False):
        assert a.shape == c.shape and a.dtype == c.dtype
        assert_as_good(a, b, c, f"gradient of {leaf}", 10 * floor)


def test_small_workspace_gives_the_same(backend):
    problem = make_problem(24, 300, bias=True)
    # Room for the logits of 10 rows; of one row where the row kernels are PyTorch's, which take 28 bytes a logit.
    whole, blocked = run(problem, backend), run(problem, backend, workspace_bytes=1 << 14)
    for name in ALL_OUTPUTS[:-1]:
        torch.testing.assert_close(getattr(blocked, name), getattr(whole, name), rtol=2e-6, atol=2e-6)
    for a, b in zip(
        gradients(blocked.logprobs.square().sum(), problem),
        gradients(whole.logprobs.square().sum(), problem),
        strict=True,
    ):
        assert error(a, b) < 1e-6


def test_minus_infinity_logits_get_no_probability_and_no_gradient(backend):
    problem = make_problem(6, 50, bias=True)
    with torch.no_grad():
        problem.bias[10:20] = float("-inf")
    problem.targets = problem.targets % 10
    got = run(problem, backend)
    exact = reference(problem, torch.float64)
    assert error(got.logprobs, exact["logprobs"]) < 1e-6 and error(got.entropy, exact["entropy"]) < 1e-6
    grad_hidden, grad_weight, _ = gradients(got.logprobs.sum() + got.entropy.sum(), problem)
    assert torch.isfinite(grad_hidden).all()
    assert (grad_weight[10:20] == 0).all()


def test_large_offset_does_not_lose_the_gradient(backend):
    problem, shifted = make_problem(7, 64, bias=True), make_problem(7, 64, bias=True)
    with torch.no_grad():
        shifted.bias += 1e4
    for a, b in zip(
        gradients(run(shifted, backend).logprobs.sum(), shifted),
        gradients(run(problem, backend).logprobs.sum(), problem),
        strict=True,
    ):
        assert error(a, b) < 2e-3  # float32 resolves 1e-3 at 1e4


@pytest.mark.parametrize("frozen", ["hidden", "weight", "neither"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_frozen_parts_and_retained_graph(frozen, with_entropy, backend):
    problem = make_problem(11, 190)
    if frozen != "neither":
        getattr(problem, frozen).requires_grad_(False)
    leaves = [x for x in problem.leaves if x.requires_grad]

    def loss(scores):
        total = scores["logprobs"].square().sum()
        return total + scores["entropy"].sum() if with_entropy else total

    scores = run(problem, backend)
    total = loss({"logprobs": scores.logprobs, "entropy": scores.entropy})
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    true = torch.autograd.grad(loss(reference(problem, torch.float64)), leaves)
    for a, b, c in zip(first, second, true, strict=True):
        assert torch.equal(a, b)
        assert error(a, c) < 2e-6


def test_non_contiguous_inputs(backend):
    problem = make_problem(12, 96, h=16, bias=True)
    hidden = problem.hidden.detach().repeat_interleave(2, 0)[::2].t().contiguous().t().requires_grad_()
    weight = problem.weight.detach().t().contiguous().t().requires_grad_()
    targets, bias = (torch.stack([x, x.flip(0)], 1)[:, 0] for x in (problem.targets, problem.bias.detach()))
    strided = HeadProblem(hidden, weight, bias.requires_grad_(), targets)
    assert not any(x.is_contiguous() for x in (hidden, weight, targets, bias))
    ours, plain = run(strided, backend).logprobs, run(problem, backend).logprobs
    assert error(ours, plain) < 1e-6
    for a, b in zip(gradients(ours.sum(), strided), gradients(plain.sum(), problem), strict=True):
        assert error(a, b) < 1e-6


def test_autocast_takes_float32_parameters(backend):
    problem = make_problem(10, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = run(problem, backend)
    narrow = make_problem(10, 128)
    narrow.hidden.data = narrow.hidden.data.bfloat16().float()
    narrow.weight.data = narrow.weight.data.bfloat16().float()
    exact = reference(narrow, torch.float64)
    assert scores.logprobs.dtype == torch.float32
    assert error(scores.logprobs, exact["logprobs"]) < 8e-3
    grad_hidden, grad_weight = gradients(scores.logprobs.sum(), problem)
    assert grad_hidden.dtype == torch.float32 and grad_weight.dtype == torch.float32


def test_gradients_by_finite_differences():
    problem = make_problem(4, 9, h=3, dtype=torch.float64, bias=True, softcap=3.0, logit_scale=0.7, temperature=1.3)

    def function(hidden, weight, bias):
        scores = linear_logprob(
            hidden, weight, problem.targets, bias=bias, outputs=("entropy",), backend="torch", **problem.transform
        )
        return scores.logprobs, scores.entropy

    assert torch.autograd.gradcheck(function, problem.leaves)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_opcheck(keep, backend):
    if backend == "triton":
        pytest.skip("the interpreter reads pointers, which fake tensors do not have; the same op is checked on cpp")
    problem = make_problem(5, 33, bias=True)
    if keep == 2:
        problem.weight.requires_grad_(False)
        problem.bias.requires_grad_(False)
    args = (problem.hidden, problem.weight, problem.targets, problem.bias, 1.0, 0.0, 1.0, 15, keep, 1 << 20, backend)
    torch.library.opcheck(linear_scores, args)
    lse = torch.zeros(5)
    torch.library.opcheck(
        linear_scores_backward,
        (
            *(x.detach() for x in args[:4]),
            lse,
            torch.ones(4, 5),
            torch.zeros(0, 0, 0),
            torch.zeros(0),
            1.0,
            0.0,
            1.0,
            True,
            True,
            True,
            1 << 20,
            backend,
        ),
    )


def test_same_seed_same_bits(backend):
    first, second = (run(make_problem(30, 400), backend).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_a_row_that_is_not_finite_shows_in_the_gradient(backend):
    """A diverged model must not look like one that has nothing left to learn."""
    problem = make_problem(3, 40)
    with torch.no_grad():
        problem.hidden[1] = float("nan")
    scores = linear_logprob(problem.hidden, problem.weight, problem.targets, backend=backend)
    scores.logprobs.sum().backward()
    assert scores.logprobs.isnan().tolist() == [False, True, False]
    assert problem.hidden.grad[1].isnan().all() and problem.weight.grad.isnan().any()
    assert problem.hidden.grad[[0, 2]].isfinite().all()
