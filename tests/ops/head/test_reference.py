"""Tests the reference of the whole op against autograd, and every backend against the reference."""

import pytest
import torch

from support.heads import error, make_problem, scores_from_logits
from trl_fast.ops import linear_logprob
from trl_fast.ops.head.logit_transform import LogitTransform
from trl_fast.ops.head.reference import scores_and_gradients

TRANSFORMS = [{}, {"temperature": 0.7, "logit_scale": 0.5, "softcap": 20.0}]


def problem_and_reference(transform, bias):
    """A problem with upstream gradients (N,) of log-probability and entropy, and what the reference makes of it."""
    problem = make_problem(9, 70, bias=bias, **transform)
    upstream = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = [None if x is None else x.detach().double() for x in (problem.hidden, problem.weight, problem.bias)]
    found = scores_and_gradients(*tensors[:2], problem.targets, tensors[2], LogitTransform.of(**transform), *upstream)
    return problem, upstream, found


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_is_what_autograd_says(transform, bias):
    problem, upstream, found = problem_and_reference(transform, bias)
    scores = scores_from_logits(problem.logits(torch.float64), problem.targets)
    assert error(found.logprobs, scores["logprobs"]) < 1e-12 and error(found.entropy, scores["entropy"]) < 1e-12
    loss = (upstream[0] * scores["logprobs"] + upstream[1] * scores["entropy"]).sum()
    gradients = torch.autograd.grad(loss, problem.leaves)
    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=False):
        assert error(getattr(found, name), gradient) < 1e-6, name


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "transformed"])
def test_every_backend_computes_what_the_reference_does(transform, backend):
    problem, upstream, found = problem_and_reference(transform, bias=True)
    given = (problem.hidden, problem.weight, problem.targets)
    options = {"bias": problem.bias, "outputs": ("entropy",), "backend": backend, **transform}
    scores = linear_logprob(*given, **options)
    loss = (upstream[0] * scores.logprobs + upstream[1] * scores.entropy).sum()
    gradients = torch.autograd.grad(loss, problem.leaves)
    assert error(scores.logprobs, found.logprobs) < 1e-6 and error(scores.entropy, found.entropy) < 1e-6
    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
        assert error(gradient, getattr(found, name)) < 5e-6, name
