"""Every loss formula at extreme log-ratios, value and gradient against float64: PyTorch and Triton.

tests/csrc/test_cuda_losses.py does the same with the CUDA kernels.
"""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from support.extreme_losses import (
    PAIR_FLOORS,
    SIGNED,
    TINY,
    assert_exact,
    pair_inputs,
    policy_inputs,
    run_pair,
    run_policy,
)
from support.losses import interpreted_losses
from trl_fast.losses.f_divergences import F_DIVERGENCES
from trl_fast.losses.kto import KTOLossConfig, kto_losses
from trl_fast.losses.loss_inputs import PolicyLossInputs
from trl_fast.losses.policy_gradient import PolicyLossConfig, policy_terms
from trl_fast.ops import pair_loss, policy_loss
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.policy_loss import LOSS_TYPES
from trl_fast.ops.stable_functions import exp_beyond_linear, logistic


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with interpreted_losses() if request.param == "triton" else contextlib.nullcontext():
        yield request.param


def of(backend, forward):
    """The op by one backend for float32, by PyTorch for the float64 it is held to."""

    def call(logprobs, *others, **numbers):
        return forward(logprobs, *others, backend=backend if logprobs.dtype == torch.float32 else "torch", **numbers)

    return call


@pytest.mark.parametrize("loss_type", PAIR_FORMULAS)
def test_pair_losses(loss_type, backend):
    # The interpreter is slow; 17 has no factor in common with a row of the grid.
    run, inputs = run_pair(loss_type, of(backend, pair_loss)), pair_inputs(loss_type, 17 if backend == "triton" else 1)
    assert_exact(run, run(*inputs), inputs, loss_type, PAIR_FLOORS.get(loss_type, TINY))


@pytest.mark.parametrize("bias_correct_kl", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_losses(loss_type, bias_correct_kl, backend):
    run, inputs = run_policy(loss_type, bias_correct_kl, 0.0, of(backend, policy_loss)), policy_inputs()
    assert_exact(run, run(*inputs), inputs, loss_type)


@pytest.mark.parametrize("bias_correct_kl", [False, True])
def test_kl_estimates(bias_correct_kl, backend):
    """Alone: without an advantage nothing else has a gradient."""
    run = run_policy("clip", bias_correct_kl, 1.0, of(backend, policy_loss))
    old, ref, advantages = policy_inputs()
    inputs = (old, ref, torch.zeros_like(advantages))
    assert_exact(run, run(*inputs), inputs, "kl")
    if bias_correct_kl:
        found, ratio = run(*inputs)[1].double(), old.double().exp()
        torch.testing.assert_close(found, -ref.double() * ratio, rtol=4e-6, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_estimates_of_the_trainers(level):
    """The losses' own path, with the ratio of a token or of its sequence of one token."""
    old, ref, advantages = policy_inputs()
    config = PolicyLossConfig(importance_sampling_level=level, beta=1.0)

    def run(old, ref, advantages):
        logprobs = torch.zeros_like(old).requires_grad_()
        numbers = (torch.arange(len(old)), advantages, torch.ones_like(old))
        inputs = PolicyLossInputs(*numbers, old_logprobs=-old, ref_logprobs=ref)
        found = policy_terms(logprobs, inputs, config)
        (gradient,) = torch.autograd.grad(found.terms.sum(), logprobs)
        return (found.kl, gradient) if level == "token" else (found.kl,)

    inputs = (old, ref, torch.zeros_like(advantages))
    assert_exact(run, run(*inputs), inputs, level)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_f_divergences(name):
    """Scores from −80 on: beyond, exponents are capped."""

    def run(logratios):
        logratios = logratios.clone().requires_grad_()
        scores = F_DIVERGENCES[name](logratios, 0.3)
        return scores.detach(), torch.autograd.grad(scores.sum(), logratios)[0]

    inputs = (SIGNED[SIGNED > -79],)
    # log 2 is a constant, which cancels in the difference of two scores.
    assert_exact(run, run(*inputs), inputs, name, floor=1e-7 if name == "js_divergence" else TINY)


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_scores_and_losses_of_f_divergences_are_numbers(name):
    logratios = SIGNED.clone().requires_grad_()
    scores = F_DIVERGENCES[name](logratios, 0.3)
    differences = scores[:, None] - scores
    differences.sum().backward()
    assert differences.isfinite().all() and logratios.grad.isfinite().all()


@pytest.mark.parametrize("good", [True, False])
def test_kto(good):
    config = KTOLossConfig(beta=1.0, desirable_weight=1.5)

    def run(logratios, kl):
        logratios = logratios.clone().requires_grad_()
        losses = kto_losses(logratios, torch.full((len(logratios),), good), kl, config)
        return losses.detach(), torch.autograd.grad(losses.sum(), logratios)[0]

    inputs = (SIGNED, torch.zeros_like(SIGNED))
    assert_exact(run, run(*inputs), inputs, "kto")


def test_functions():
    x = SIGNED.double()
    series = sum(x**k / float(math.factorial(k)) for k in range(2, 22))
    near = x.abs() < 1
    torch.testing.assert_close(exp_beyond_linear(x)[near], series[near], rtol=1e-14, atol=0)
    torch.testing.assert_close(exp_beyond_linear(SIGNED).double()[near], series[near], rtol=3e-7, atol=0)
    given = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(logistic, given)
