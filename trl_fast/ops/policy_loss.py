"""Computes policy-gradient losses from per-token log-probabilities, with token-level importance sampling.

Notation: ρ = π(token) / π_old(token), A the advantage of the token's sequence, ε_low, ε_high and δ its bounds, σ the
logistic function, sg stop-gradient. Autograd through `_reference` is the PyTorch backend and the kernels'
specification. A kernel computes each token's term and its derivative, (N,), which backward multiplies by a scalar: on
a GPU two launches forward, the kernel and the sum of its blocks' sums (no atomics: the same bits every time), and one
backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from trl_fast.kernels.shared_constants import POLICY_LOSS_BLOCK

from .backends import choose_backend
from .device import device_facts
from .named_gradients import AutogradContext, first_derivative, gradients_of
from .stable_functions import exp_beyond_linear, logistic, with_derivative
from .validation import check_choice, check_logprobs, check_vector, refuse_forward_mode, values_are_checked

# Log-ratios are capped here, so that ρ, and ρ times the KL estimate, stay finite in float32. What is capped, a ratio
# above 2e17, gets no gradient.
MAX_LOG_RATIO = 40.0

LOSS_TYPES = ("clip", "cispo", "sapo")


class PolicyLoss(NamedTuple):
    """Holds the loss, its KL estimates and which tokens were clipped.

    Attributes:
        loss: 0-d, in the dtype of the logprobs. Differentiable.
        kl: (N,), the KL estimate of each token without its weight and β, or None without a reference. No gradient.
        clipped: (N,) int8, −1 where ρ is below the lower bound and A < 0, 1 where it is above the upper and A > 0.
    """

    loss: torch.Tensor
    kl: torch.Tensor | None
    clipped: torch.Tensor


@dataclass(frozen=True)
class _Parameters:
    """Holds the numbers of a loss: `lower` and `upper` bound ρ inside the minimum of `clip`, `delta` outside it.

    `upper` also caps the ρ of `cispo`.
    """

    loss_type: str
    beta: float
    lower: float
    upper: float
    delta: float
    temperature_pos: float
    temperature_neg: float
    bias_correct_kl: bool


def _cuda_forward(*args: Any) -> torch.Tensor:
    """Calls the CUDA kernel with the arguments of the Triton one; returns the loss's partial sums, (blocks,)."""
    from trl_fast import _C

    *vectors, loss_type, beta, lower, upper, delta, temperature_pos, temperature_neg, unbiased, cap = args[:15]
    logprobs = vectors[0]
    partial_sums = logprobs.new_empty(-(-len(logprobs) // POLICY_LOSS_BLOCK))
    numbers = (beta, lower, upper, delta, temperature_pos, temperature_neg, unbiased, cap)
    loss = _C.loss_formulas()["policy_loss"][loss_type]
    torch.ops.trl_fast.policy_loss_forward(*vectors, loss, *numbers, partial_sums, *args[15:])
    return partial_sums


@torch.library.custom_op("trl_fast::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    branch: torch.Tensor,
    weights: torch.Tensor,
    loss_type: str,
    beta: float,
    lower: float,
    upper: float,
    delta: float,
    temperature_pos: float,
    temperature_neg: float,
    bias_correct_kl: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss 0-d, kl (N,) or (0,) without a reference, clipped (N,) int8, gradients (N,) of the loss."""
    forward: Callable[..., torch.Tensor] = _cuda_forward
    if backend != "cuda":
        from trl_fast.kernels.loss_kernels import policy_loss_forward

        forward = policy_loss_forward
    gradients = torch.empty_like(logprobs)
    kl = logprobs.new_empty(0 if ref_logprobs is None else len(logprobs))
    clipped = torch.empty_like(logprobs, dtype=torch.int8)
    partial_sums = forward(
        *(logprobs, old_logprobs, ref_logprobs, advantages, branch, weights),
        *(loss_type, beta, lower, upper, delta, temperature_pos, temperature_neg, bias_correct_kl, MAX_LOG_RATIO),
        *(kl, clipped, gradients),
    )
    return partial_sums.sum(), kl, clipped, gradients


@_policy_loss.register_fake
def _(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor | None, ref_logprobs: torch.Tensor | None, *others: object
) -> tuple[torch.Tensor, ...]:
    kl = logprobs.new_empty(0 if ref_logprobs is None else logprobs.shape[0])
    return logprobs.new_empty(()), kl, torch.empty_like(logprobs, dtype=torch.int8), torch.empty_like(logprobs)


def _setup_context(ctx: AutogradContext, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, kl, clipped, gradients = output
    ctx.mark_non_differentiable(kl, clipped, gradients)
    ctx.save_for_backward(gradients)


@first_derivative("policy_loss")
def _backward(ctx: AutogradContext, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (gradients,) = ctx.saved_tensors
    return gradients_of("trl_fast::policy_loss", logprobs=grad_loss * gradients)


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


def clip_terms(
    ratio: torch.Tensor, advantages: torch.Tensor, lower: float, upper: float, delta: float
) -> torch.Tensor:
    """Returns −min(min(ρ, δ)·A, clip(ρ, 1−ε_low, 1+ε_high)·A), (N,).

    PPO, arXiv 1707.06347, Eq. 7, with the two bounds of DAPO, arXiv 2503.14476, and δ of INTELLECT-2, arXiv
    2505.07291.
    """
    return -torch.min(ratio.clamp(max=delta) * advantages, ratio.clamp(lower, upper) * advantages)


def cispo_terms(ratio: torch.Tensor, advantages: torch.Tensor, upper: float, logprobs: torch.Tensor) -> torch.Tensor:
    """Returns −sg(min(ρ, ε_high))·A·log π, (N,). CISPO, arXiv 2506.13585."""
    return -ratio.clamp(max=upper).detach() * advantages * logprobs


def sapo_terms(ratio: torch.Tensor, advantages: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """Returns −(4/τ)·σ(τ·(ρ − 1))·A, (N,), with τ = `positive` where A > 0, else `negative`.

    SAPO, arXiv 2511.20347.
    """
    temperature = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
    return -logistic(temperature * (ratio - 1)) * 4 / temperature * advantages


def kl_estimates(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Returns e^d − d − 1, (N,), with d = log π_ref − log π: k3 of Schulman, "Approximating KL Divergence" (2020).

    A capped estimate is a constant.
    """
    return with_derivative(_kl, _kl_derivative, logprobs, ref_logprobs)


def _kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    return exp_beyond_linear((ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO))


def _kl_derivative(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    difference = ref_logprobs - logprobs
    return -torch.expm1(difference.clamp(max=MAX_LOG_RATIO)).masked_fill(difference > MAX_LOG_RATIO, 0.0)


def corrected_kl_estimates(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor
) -> torch.Tensor:
    """Returns ρ·(e^d − d − 1), (N,), whose expectation under the old policy, and gradient, are those of the KL.

    ρ·e^d = π_ref / π_old does not depend on π, so the gradient by log π is −d·ρ: autograd would take the difference of
    two numbers of size ρ·e^d. A ratio that is capped is a constant, and so is a capped estimate, also to ρ, whose
    gradient alone would push away from the reference.
    """
    return with_derivative(_corrected_kl, _corrected_kl_derivative, logprobs, ref_logprobs, old_logprobs)


def _corrected_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    return _kl(logprobs, ref_logprobs) * (logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO).exp()


def _corrected_kl_derivative(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor
) -> torch.Tensor:
    difference, log_ratio = ref_logprobs - logprobs, logprobs - old_logprobs
    capped, ratio = difference.clamp(max=MAX_LOG_RATIO), log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    derivative = -torch.where(log_ratio > MAX_LOG_RATIO, torch.expm1(capped), capped) * ratio
    return derivative.masked_fill(difference > MAX_LOG_RATIO, 0.0)


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, parameters: _Parameters) -> torch.Tensor:
    too_high = (ratio > parameters.upper) & (advantages > 0)
    too_low = (ratio < parameters.lower) & (advantages < 0)
    return too_high.to(torch.int8) - too_low.to(torch.int8)


def _reference(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    branch: torch.Tensor,
    weights: torch.Tensor,
    parameters: _Parameters,
) -> PolicyLoss:
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO))
    advantages = advantages[branch]
    if parameters.loss_type == "clip":
        terms = clip_terms(ratio, advantages, parameters.lower, parameters.upper, parameters.delta)
        clipped = _clipped(ratio.clamp(max=parameters.delta), advantages, parameters)
    elif parameters.loss_type == "cispo":
        terms = cispo_terms(ratio, advantages, parameters.upper, logprobs)
        clipped = _clipped(ratio, advantages, parameters)
    else:
        terms = sapo_terms(ratio, advantages, parameters.temperature_pos, parameters.temperature_neg)
        clipped = torch.zeros_like(terms, dtype=torch.int8)
    kl = None
    if ref_logprobs is not None:
        if parameters.bias_correct_kl:
            kl = corrected_kl_estimates(logprobs, ref_logprobs, old_logprobs)
        else:
            kl = kl_estimates(logprobs, ref_logprobs)
        terms = terms + parameters.beta * kl
        kl = kl.detach()
    return PolicyLoss((weights[branch] * terms).sum(), kl, clipped)


def _parameters(
    loss_type: str,
    beta: float,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    temperature_pos: float,
    temperature_neg: float,
    bias_correct_kl: bool,
) -> _Parameters:
    check_choice("loss_type", loss_type, LOSS_TYPES)
    for name, factor in (("beta", beta), ("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        if not (factor >= 0 and (factor < math.inf or name == "epsilon_high")):
            raise ValueError(f"{name}={factor}: expected a finite number of at least 0")
    for name, value in (
        ("delta", delta),
        ("temperature_pos", temperature_pos),
        ("temperature_neg", temperature_neg),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}: expected a positive number")
    # cispo takes epsilon_high for the bound itself and has no lower one.
    lower, upper = (-math.inf, epsilon_high) if loss_type == "cispo" else (1 - epsilon_low, 1 + epsilon_high)
    bound = math.inf if delta is None else delta
    return _Parameters(loss_type, beta, lower, upper, bound, temperature_pos, temperature_neg, bias_correct_kl)


def _check_inputs(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    branch: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    check_logprobs(logprobs)
    num_tokens, num_sequences = len(logprobs), advantages.numel()
    for name, vector in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if vector is not None:
            check_vector(name, vector, num_tokens, logprobs)
    check_vector("branch", branch, num_tokens, logprobs, torch.int64)
    check_vector("advantages", advantages, num_sequences, logprobs)
    check_vector("weights", weights, num_sequences, logprobs)
    if values_are_checked(branch) and bool(((branch < 0) | (branch >= num_sequences)).any()):
        raise ValueError(
            f"branch: expected sequences in [0, {num_sequences}), the range of advantages, "
            f"got values from {int(branch.min())} to {int(branch.max())}"
        )


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    branch: torch.Tensor,
    weights: torch.Tensor,
    *,
    ref_logprobs: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    loss_type: str = "clip",
    temperature_pos: float = 1.0,
    temperature_neg: float = 1.05,
    bias_correct_kl: bool = True,
    backend: str | None = None,
) -> PolicyLoss:
    """Computes Σ_t weights[branch_t]·(term_t + β·kl_t) over N tokens of S sequences.

    Args:
        logprobs: (N,) float32 log-probabilities under the policy (float64 for the reference).
        old_logprobs: (N,) float32 under the policy that sampled, or None for this one: ρ = 1, with its gradient.
        advantages: (S,) float32.
        branch: (N,) int64, the sequence of each token.
        weights: (S,) float32, what a token of each sequence counts: 1 / (its length · S) for GRPO's mean of means,
            1 / (number of tokens) for DAPO, 1 / (S · longest completion allowed) for Dr. GRPO.
        ref_logprobs: (N,) float32 under the reference; needed if beta > 0.
        beta: the KL coefficient.
        epsilon_low, epsilon_high: ρ stays in [1 − ε_low, 1 + ε_high]; for `cispo` in [0, ε_high].
        delta: the bound of `clip` on ρ outside the minimum, None for none.
        loss_type: "clip" (GRPO, BNPO, Dr. GRPO and DAPO, which differ in their weights), "cispo" or "sapo"; the
            functions of this module named after them have the formulas and papers.
        temperature_pos, temperature_neg: `sapo`'s τ for A > 0 and for the rest.
        bias_correct_kl: whether the KL estimate is multiplied by ρ.

    Returns:
        The loss, differentiable in logprobs; the KL estimates; which tokens were clipped.

    Raises:
        ValueError: a shape, dtype, device, name or number is not as above.
        RuntimeError: the forced backend cannot serve.
    """
    parameters = _parameters(
        loss_type, beta, epsilon_low, epsilon_high, delta, temperature_pos, temperature_neg, bias_correct_kl
    )
    if beta > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected the reference's log-probabilities for beta={beta}, got None")
    _check_inputs(logprobs, old_logprobs, ref_logprobs, advantages, branch, weights)
    old_logprobs, ref_logprobs = (None if v is None else v.detach() for v in (old_logprobs, ref_logprobs))
    vectors = (logprobs, old_logprobs, ref_logprobs, advantages.detach(), branch, weights.detach())
    backend = choose_backend("policy_loss", backend, device_facts(logprobs.device), logprobs.dtype, loss_type)
    if backend == "torch":
        return _reference(*vectors, parameters)
    refuse_forward_mode("policy_loss", logprobs)
    contiguous = (None if vector is None else vector.contiguous() for vector in vectors)
    loss, kl, clipped, _ = _policy_loss(*contiguous, *vars(parameters).values(), backend)
    return PolicyLoss(loss, None if ref_logprobs is None else kl, clipped)
