"""Derivatives that the ops do not have are refused by name, on every way to them; those of a loss's own are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from support.heads import make_problem
from support.losses import interpreted_losses, pair_problem, policy_problem
from trl_fast.ops import (
    linear_cross_entropy,
    linear_logprob,
    linear_token_loss,
    pair_loss,
    policy_loss,
    selective_log_softmax,
)
from trl_fast.ops.pair_formulas import PAIR_FORMULAS
from trl_fast.ops.stable_functions import expm1, logistic

N, V, H = 5, 30, 8
PROBLEM = make_problem(N, V, H)
WEIGHT, TARGETS = PROBLEM.weight.detach(), PROBLEM.targets
TRAINED = WEIGHT.clone().requires_grad_()


def token_loss(hidden: torch.Tensor, weight: torch.Tensor, **options) -> torch.Tensor:
    return linear_token_loss(hidden, weight, TARGETS, lambda s, _: s.logprobs.square().sum(), **options).loss


# By the name in the message: the ways to it, each a function of hidden states (N, H).
WAYS = {
    "head": [
        lambda x: linear_logprob(x, WEIGHT, TARGETS).logprobs.exp().sum(),
        lambda x: linear_logprob(x, WEIGHT, TARGETS).logprobs.sum(),
        lambda x: linear_logprob(x, TRAINED, TARGETS).logprobs.square().sum(),
        lambda x: linear_logprob(x, WEIGHT, TARGETS, outputs=("entropy",)).entropy.sum(),
        lambda x: linear_logprob(x, TRAINED, TARGETS, head_grad="sparse").logprobs.square().sum(),
        lambda x: linear_cross_entropy(x, WEIGHT, TARGETS, reduction="none").square().sum(),
        lambda x: token_loss(x, WEIGHT, group_sizes=[2, 3]),
    ],
    "linear_cross_entropy": [
        lambda x: linear_cross_entropy(x, WEIGHT, TARGETS),
        lambda x: linear_cross_entropy(x, TRAINED, TARGETS, reduction="sum").square(),
    ],
    "linear_token_loss": [
        lambda x: token_loss(x, WEIGHT),
        lambda x: token_loss(x, TRAINED),
        lambda x: token_loss(x, TRAINED, group_sizes=[2, 3]).square(),
    ],
    "selective_log_softmax": [lambda x: selective_log_softmax(x, TARGETS % H).square().sum()],
}
CASES = [(name, way) for name, ways in WAYS.items() for way in ways]


def hidden() -> torch.Tensor:
    return PROBLEM.hidden.detach().clone().requires_grad_()


@pytest.mark.parametrize("name, way", CASES)
def test_second_derivatives_are_refused_by_name(name, way):
    x = hidden()
    with pytest.raises(RuntimeError, match=f"{name}.* has no second derivative.*create_graph=True"):
        torch.autograd.grad(way(x), x, create_graph=True)
    # The first derivative of the same is there, and twice.
    loss = way(x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0


@pytest.mark.parametrize("name, way", CASES)
def test_forward_mode_is_refused_by_name(name, way):
    x = hidden().detach()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(way, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("name, way", CASES)
def test_functional_transforms_are_refused(name, way):
    with pytest.raises(RuntimeError):
        torch.func.grad(way)(hidden().detach())


def test_forward_mode_through_the_trained_weight_is_refused():
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        x = hidden()
        torch.func.jvp(lambda w: linear_logprob(x, w, TARGETS).logprobs, (WEIGHT,), (torch.ones_like(WEIGHT),))


def test_losses_of_vectors_refuse_both_in_kernels():
    (logprobs, *pairs), (positional, reference) = pair_problem((3, 4)).arguments(), policy_problem((3, 4)).arguments()
    losses = {
        "pair_loss": lambda x, **how: pair_loss(x, *pairs, **how).losses.square().sum(),
        "policy_loss": lambda x, **how: policy_loss(x, *positional[1:], **reference, beta=0.1, **how).loss.square(),
    }
    for name, loss in losses.items():
        x = (logprobs if name == "pair_loss" else positional[0]).detach().clone().requires_grad_()
        with interpreted_losses():
            with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
                torch.autograd.grad(loss(x, backend="triton"), x, create_graph=True)
            with pytest.raises(RuntimeError, match=f"{name} has no forward-mode derivative"):
                torch.func.jvp(lambda x, f=loss: f(x, backend="triton"), (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("groups", [None, [2, 3]])
@pytest.mark.parametrize("workspace_bytes", [None, 4 * V * 2])
def test_parameters_of_the_loss_get_their_gradient(trains, groups, workspace_bytes):
    factor, shift = (torch.tensor(value, requires_grad=True) for value in (2.0, 0.5))
    x, weight = hidden(), WEIGHT.clone().requires_grad_(trains)
    # What the loss's parameters go through before is shared by all blocks.
    scaled = factor.square()

    def loss(scores, rows):
        return (scaled * scores.logprobs + shift * scores.logprobs.square()).sum()

    options = {"group_sizes": groups, "workspace_bytes": workspace_bytes, "backend": "cpp"}
    found = linear_token_loss(x, weight, TARGETS, loss, **options)
    leaves = [factor, shift, x]
    ours = torch.autograd.grad(3 * found.loss, leaves)
    exact = (x.double() @ weight.double().t()).log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    value = (factor.double().square() * exact + shift * exact.square()).sum()
    torch.testing.assert_close(found.loss.double(), value, rtol=1e-6, atol=0)
    for a, b in zip(ours, torch.autograd.grad(3 * value, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not linear_token_loss(x, weight, TARGETS, loss, **options).loss.requires_grad


def test_a_parameter_of_a_loss_without_any_other_gradient_gets_its_own():
    factor = torch.tensor(2.0, requires_grad=True)
    x = hidden().detach()
    loss = linear_token_loss(x, WEIGHT, TARGETS, lambda scores, _: factor * scores.logprobs.sum()).loss
    torch.testing.assert_close(torch.autograd.grad(loss, factor)[0], linear_logprob(x, WEIGHT, TARGETS).logprobs.sum())


def vector_losses() -> dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]:
    """By name, losses in plain PyTorch of log-probabilities (N,) float64, and such away from the losses' kinks."""
    logprobs, *pairs = pair_problem((3, 4, 2, 3)).arguments(torch.float64)
    pair_options = {"label_smoothing": 0.1, "beta": 0.4, "discopop_tau": 0.7, "backend": "torch"}
    losses = {
        f"pair_loss {name}": (
            lambda x, name=name: pair_loss(x, *pairs, loss_type=name, **pair_options).losses,
            logprobs,
        )
        for name in PAIR_FORMULAS
    }
    (logprobs, *others), reference = policy_problem((3, 4, 2, 3)).arguments(torch.float64)
    for loss_type, corrected in itertools.product(("clip", "sapo"), (True, False)):
        options = {"loss_type": loss_type, "bias_correct_kl": corrected, "beta": 0.3, "backend": "torch"}
        name = f"policy_loss {loss_type} {'corrected' if corrected else 'plain'} KL"
        losses[name] = (lambda x, options=options: policy_loss(x, *others, **reference, **options).loss, logprobs)
    return losses


VECTOR_LOSSES = vector_losses()


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_plain_losses_of_vectors_have_second_derivatives_and_forward_mode(name):
    loss, logprobs = VECTOR_LOSSES[name]
    assert torch.autograd.gradcheck(loss, logprobs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, logprobs)
    tangent = torch.linspace(-1, 1, len(logprobs), dtype=torch.float64)
    _, forward = torch.func.jvp(loss, (logprobs.detach(),), (tangent,))
    backward = torch.func.grad(lambda x: loss(x).sum())(logprobs.detach())
    torch.testing.assert_close(forward.sum(), backward @ tangent, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [logistic, expm1])
def test_functions_in_closed_form_have_second_derivatives(function):
    x = torch.tensor([-3.0, -0.2, 0.0, 0.7, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("on_policy", [True, False])
def test_a_ratio_that_is_held_constant_is_so_in_the_second_derivative(on_policy):
    # cispo's ratio, and the log-probabilities of a policy that has not changed, stop the gradient by definition.
    (logprobs, old, advantages, branch, weights), reference = policy_problem((3, 4), on_policy=on_policy).arguments(
        torch.float64
    )
    options = {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.3, "backend": "torch"}
    loss = policy_loss(logprobs, old, advantages, branch, weights, **reference, **options).loss
    fixed = (logprobs if old is None else old).detach()
    ratio, difference = (logprobs - fixed).exp(), reference["ref_logprobs"] - logprobs
    terms = -ratio.detach() * advantages[branch] * logprobs + 0.3 * ratio * (difference.exp() - difference - 1)
    expected = (weights[branch] * terms).sum()
    found = []
    for value in (loss, expected):
        (first,) = torch.autograd.grad(value, logprobs, create_graph=True)
        found.append((value, first, *torch.autograd.grad(first.square().sum(), logprobs)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
