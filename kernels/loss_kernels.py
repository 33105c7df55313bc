"""Computes losses in Triton; `trl_fast/ops/pair_loss.py` and `policy_loss.py` specify them and explain the names.

Offsets are 64-bit. No length and no number makes Triton compile again: only names of losses, flags and block sizes are
compile-time constants. The formulas are those of `trl_fast/ops/pair_formulas.py`, each beside its derivative.
"""

import math

import torch
import triton
import triton.language as tl

from .launching import on_tensors_device

BLOCK, NUM_WARPS = 1024, 4
# One program sums a whole pair, so it gets more threads.
PAIR_BLOCK, PAIR_WARPS = 2048, 8
# CUDA has no more blocks along y.
MOST_PARTS = 65535

# The formulas of each op, by name. Margin losses read the difference of the two rewards only.
MARGIN_LOSSES = ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop")
SEPARATE_LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
NORMALIZED_LOSSES = ("sigmoid_norm", "ipo")
LOSS_FORMULAS = {"pair_loss": (*MARGIN_LOSSES, *SEPARATE_LOSSES), "policy_loss": ("clip", "cispo", "sapo")}


@triton.jit
def _at_most(x, bound):
    """Returns the minimum. Unlike tl.minimum it keeps a NaN: one in the input must reach the loss."""
    return tl.where(x > bound, bound, x)


@triton.jit
def _log_sigmoid(x):
    """Returns min(x, 0) − log(1 + e^−|x|), the logarithm as the series of 2·artanh(s), s = e / (2 + e) ≤ 1/3.

    A GPU's fast logarithm has an absolute error, which near 1 is most of the result.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1.0 / 9 + z * (1.0 / 11 + z * (1.0 / 13))
    series = 1.0 + z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * series)))
    return tl.minimum(x, 0.0) - 2.0 * s * series


@triton.jit
def _margin_loss(x, beta, eps, log_eps, log_one_minus_eps, tau, LOSS: tl.constexpr):
    """Returns the loss and its gradient by x, the scaled margin, of a loss that reads nothing else."""
    p, q = tl.sigmoid(x), tl.sigmoid(-x)
    log_p, log_q = _log_sigmoid(x), _log_sigmoid(-x)
    if LOSS == "hinge":
        loss, gradient = tl.where(x >= 1.0, 0.0, 1.0 - x), tl.where(x >= 1.0, 0.0, -1.0)
    elif LOSS == "ipo":
        residual = (x - 0.5) / beta
        loss, gradient = residual * residual, 2.0 * residual / beta
    elif LOSS == "robust":
        scale = 1.0 / (1.0 - 2.0 * eps)
        loss, gradient = (eps * log_q - (1.0 - eps) * log_p) * scale, -((1.0 - eps) * q + eps * p) * scale
    elif LOSS == "exo_pair":
        chosen, rejected = log_p - log_one_minus_eps, log_q - log_eps
        loss, gradient = p * chosen + q * rejected, p * q * (chosen - rejected)
    elif LOSS == "discopop":
        sharp = x / tau
        m, rest = tl.sigmoid(sharp), tl.sigmoid(-sharp)
        mixed = tl.exp(_log_sigmoid(sharp) - x)
        loss, gradient = mixed - rest * log_p, m * rest * log_p / tau - rest * q + mixed * (rest / tau - 1.0)
    else:
        tl.static_assert(LOSS == "sigmoid" or LOSS == "sigmoid_norm")
        loss, gradient = -log_p, -q
    return loss, gradient


@triton.jit
def _separate_loss(chosen, rejected, beta, LOSS: tl.constexpr):
    """Returns the loss and its gradients by β·r_c and β·r_r, of a loss that reads the two apart."""
    p_c, q_c = tl.sigmoid(chosen), tl.sigmoid(-chosen)
    p_r, q_r = tl.sigmoid(rejected), tl.sigmoid(-rejected)
    if LOSS == "sppo_hard":
        c, r = (chosen - 0.5) / beta, (rejected + 0.5) / beta
        loss, chosen_gradient, rejected_gradient = c * c + r * r, 2.0 * c / beta, 2.0 * r / beta
    elif LOSS == "apo_zero":
        loss, chosen_gradient, rejected_gradient = q_c + p_r, -p_c * q_c, p_r * q_r
    elif LOSS == "apo_down":
        q = tl.sigmoid(rejected - chosen)
        rejected_gradient = q * tl.sigmoid(chosen - rejected)
        loss, chosen_gradient = p_c + q, p_c * q_c - rejected_gradient
    elif LOSS == "nca_pair":
        loss = -_log_sigmoid(chosen) - 0.5 * (_log_sigmoid(-chosen) + _log_sigmoid(-rejected))
        chosen_gradient, rejected_gradient = 0.5 * p_c - q_c, 0.5 * p_r
    else:
        tl.static_assert(LOSS == "bco_pair")
        loss, chosen_gradient, rejected_gradient = -_log_sigmoid(chosen) - _log_sigmoid(-rejected), -q_c, p_r
    return loss, chosen_gradient, rejected_gradient


@triton.jit
def _sequence_sum(logprobs, cu_seqlens, sequence, BLOCK: tl.constexpr):
    end = tl.load(cu_seqlens + sequence + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.load(cu_seqlens + sequence), end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        total += tl.load(logprobs + tokens, mask=tokens < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def pair_loss_kernel(
    logprobs,
    cu_seqlens,
    ref_logprobs,
    lengths,
    losses,
    sequence_logprobs,
    gradients,
    beta,
    eps,
    log_eps,
    log_one_minus_eps,
    tau,
    LOSS: tl.constexpr,
    OF_MARGIN: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes one pair's loss a program."""
    pair = tl.program_id(0).to(tl.int64)
    chosen, rejected = 2 * pair, 2 * pair + 1
    chosen_logprob = _sequence_sum(logprobs, cu_seqlens, chosen, BLOCK)
    rejected_logprob = _sequence_sum(logprobs, cu_seqlens, rejected, BLOCK)
    chosen_scale, rejected_scale = beta, beta
    if NORMALIZED:
        chosen_scale /= tl.maximum(tl.load(lengths + chosen), 1).to(tl.float32)
        rejected_scale /= tl.maximum(tl.load(lengths + rejected), 1).to(tl.float32)
    chosen_reward = chosen_scale * (chosen_logprob - tl.load(ref_logprobs + chosen))
    rejected_reward = rejected_scale * (rejected_logprob - tl.load(ref_logprobs + rejected))
    if OF_MARGIN:
        margin = chosen_reward - rejected_reward
        loss, chosen_gradient = _margin_loss(margin, beta, eps, log_eps, log_one_minus_eps, tau, LOSS)
        rejected_gradient = -chosen_gradient
    else:
        loss, chosen_gradient, rejected_gradient = _separate_loss(chosen_reward, rejected_reward, beta, LOSS)
    tl.store(losses + pair, loss)
    tl.store(sequence_logprobs + chosen, chosen_logprob)
    tl.store(sequence_logprobs + rejected, rejected_logprob)
    tl.store(gradients + chosen, chosen_gradient * chosen_scale)
    tl.store(gradients + rejected, rejected_gradient * rejected_scale)


@triton.jit(do_not_specialize=["losses_stride", "sequences_stride"])
def pair_loss_backward_kernel(
    gradients,
    cu_seqlens,
    grad_losses,
    losses_stride,
    grad_sequence_logprobs,
    sequences_stride,
    out,
    HAS_LOSSES: tl.constexpr,
    HAS_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the tokens' gradients: several programs a sequence take its blocks in turn."""
    sequence = tl.program_id(0).to(tl.int64)
    grad = 0.0
    if HAS_LOSSES:
        grad += tl.load(gradients + sequence) * tl.load(grad_losses + sequence // 2 * losses_stride)
    if HAS_SEQUENCES:
        grad += tl.load(grad_sequence_logprobs + sequence * sequences_stride)
    end = tl.load(cu_seqlens + sequence + 1)
    first = tl.load(cu_seqlens + sequence) + tl.program_id(1) * BLOCK
    for start in range(first, end, tl.num_programs(1) * BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        tl.store(out + tokens, tl.zeros([BLOCK], tl.float32) + grad, mask=tokens < end)


@triton.jit
def _exp_beyond_linear(x):
    """Returns e^x − x − 1; near 0, where the difference would cancel, its series."""
    series = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8))
    series = 1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * series))
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - x - 1.0)


@triton.jit
def _kl_estimate(difference, ratio, ratio_capped, max_log_ratio, BIAS_CORRECT: tl.constexpr):
    """Returns the KL estimate and its gradient by log π; difference = log π_ref − log π."""
    capped = _at_most(difference, max_log_ratio)
    kl = _exp_beyond_linear(capped)
    gradient = -(kl + capped)
    if BIAS_CORRECT:
        # ρ·e^d = π_ref / π_old does not depend on π, so the gradient of ρ·(e^d − d − 1) is −d·ρ.
        kl, gradient = kl * ratio, tl.where(ratio_capped, gradient, -capped) * ratio
    return kl, tl.where(difference > max_log_ratio, 0.0, gradient)


# The terms: each gives the term, its gradient in log π, and −1 or 1 where the ratio was clipped from below or above.


@triton.jit
def _clipped(ratio, advantage, lower, upper):
    too_high = tl.where((ratio > upper) & (advantage > 0), 1, 0)
    return tl.where((ratio < lower) & (advantage < 0), -1, too_high)


@triton.jit
def _clip_term(ratio, advantage, lower, upper, delta):
    """Returns the clipped term. Where both sides of the minimum are equal, so are their gradients."""
    capped = _at_most(ratio, delta)
    unclipped = capped * advantage
    clipped = _at_most(tl.where(ratio < lower, lower, ratio), upper) * advantage
    constant = tl.where(unclipped <= clipped, ratio > delta, (ratio < lower) | (ratio > upper))
    gradient = tl.where(constant, 0.0, -ratio * advantage)
    return -tl.minimum(unclipped, clipped), gradient, _clipped(capped, advantage, lower, upper)


@triton.jit
def _cispo_term(ratio, advantage, lower, upper, logprob):
    gradient = -_at_most(ratio, upper) * advantage
    return gradient * logprob, gradient, _clipped(ratio, advantage, lower, upper)


@triton.jit
def _sapo_term(ratio, advantage, temperature_pos, temperature_neg):
    temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
    z = temperature * (ratio - 1.0)
    gate = tl.sigmoid(z)
    gradient = -4.0 * gate * tl.sigmoid(-z) * ratio * advantage
    return -4.0 / temperature * gate * advantage, gradient, tl.zeros_like(z)


@triton.jit(do_not_specialize=["num_tokens"])
def policy_loss_kernel(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    branch,
    weights,
    partial_sums,
    kl_out,
    clipped_out,
    gradients,
    num_tokens,
    beta,
    lower,
    upper,
    delta,
    temperature_pos,
    temperature_neg,
    max_log_ratio,
    LOSS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    BIAS_CORRECT_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes the terms of one block of tokens a program."""
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    mask = tokens < num_tokens
    logprob = tl.load(logprobs + tokens, mask=mask, other=0.0)
    sequence = tl.load(branch + tokens, mask=mask, other=0)
    advantage = tl.load(advantages + sequence, mask=mask, other=0.0)
    weight = tl.load(weights + sequence, mask=mask, other=0.0)
    log_ratio = tl.zeros([BLOCK], tl.float32)
    if HAS_OLD:
        log_ratio = logprob - tl.load(old_logprobs + tokens, mask=mask, other=0.0)
    ratio = tl.exp(_at_most(log_ratio, max_log_ratio))
    ratio_capped = log_ratio > max_log_ratio
    if LOSS == "clip":
        term, gradient, clipped = _clip_term(ratio, advantage, lower, upper, delta)
    elif LOSS == "cispo":
        term, gradient, clipped = _cispo_term(ratio, advantage, lower, upper, logprob)
    else:
        tl.static_assert(LOSS == "sapo")
        term, gradient, clipped = _sapo_term(ratio, advantage, temperature_pos, temperature_neg)
    if LOSS != "cispo":
        gradient = tl.where(ratio_capped, 0.0, gradient)
    if HAS_REF:
        difference = tl.load(ref_logprobs + tokens, mask=mask, other=0.0) - logprob
        kl, kl_gradient = _kl_estimate(difference, ratio, ratio_capped, max_log_ratio, BIAS_CORRECT_KL)
        tl.store(kl_out + tokens, kl, mask=mask)
        term += beta * kl
        gradient += beta * kl_gradient
    tl.store(clipped_out + tokens, clipped.to(tl.int8), mask=mask)
    tl.store(gradients + tokens, weight * gradient, mask=mask)
    tl.store(partial_sums + block, tl.sum(weight * term, 0))


@on_tensors_device
def pair_loss_forward(
    logprobs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logprobs: torch.Tensor,
    lengths: torch.Tensor,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    discopop_tau: float,
    losses: torch.Tensor,
    sequence_logprobs: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """Fills losses (P,), sequence_logprobs (S,) and gradients (S,) of each pair's loss by its sequences' logprobs.

    logprobs (N,), ref_logprobs (S,) float32; cu_seqlens (S + 1,), lengths (S,) int64; all contiguous.
    """
    if not len(losses):
        return
    pair_loss_kernel[(len(losses),)](
        logprobs,
        cu_seqlens,
        ref_logprobs,
        lengths,
        losses,
        sequence_logprobs,
        gradients,
        beta,
        label_smoothing,
        math.log(label_smoothing) if label_smoothing > 0 else -math.inf,
        math.log1p(-label_smoothing) if label_smoothing < 1 else -math.inf,
        discopop_tau,
        LOSS=loss_type,
        OF_MARGIN=loss_type in MARGIN_LOSSES,
        NORMALIZED=loss_type in NORMALIZED_LOSSES,
        BLOCK=PAIR_BLOCK,
        num_warps=PAIR_WARPS,
    )


@on_tensors_device
def pair_loss_backward(
    gradients: torch.Tensor,
    cu_seqlens: torch.Tensor,
    grad_losses: torch.Tensor | None,
    grad_sequence_logprobs: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fills out (N,): gradients (S,) times grad_losses (P,) of the pair, plus grad_sequence_logprobs (S,).

    Each of the two may be strided, or None.
    """
    sequences = len(gradients)
    if not sequences:
        return
    # As many programs as equally long sequences would need; the longer ones loop.
    programs = min(max(1, triton.cdiv(len(out), sequences * BLOCK)), MOST_PARTS)
    pair_loss_backward_kernel[(sequences, programs)](
        gradients,
        cu_seqlens,
        gradients if grad_losses is None else grad_losses,
        0 if grad_losses is None else grad_losses.stride(0),
        gradients if grad_sequence_logprobs is None else grad_sequence_logprobs,
        0 if grad_sequence_logprobs is None else grad_sequence_logprobs.stride(0),
        out,
        HAS_LOSSES=grad_losses is not None,
        HAS_SEQUENCES=grad_sequence_logprobs is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


@on_tensors_device
def policy_loss_forward(
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
    max_log_ratio: float,
    kl: torch.Tensor,
    clipped: torch.Tensor,
    gradients: torch.Tensor,
) -> torch.Tensor:
    """Fills kl (N,) if there is a reference, clipped (N,) int8 and gradients (N,); returns the loss's partial sums.

    logprobs, old_logprobs, ref_logprobs (N,), advantages, weights (S,) float32; branch (N,) int64; all contiguous.
    """
    blocks = triton.cdiv(len(logprobs), BLOCK)
    partial_sums = logprobs.new_empty(blocks)
    if not blocks:
        return partial_sums
    policy_loss_kernel[(blocks,)](
        logprobs,
        logprobs if old_logprobs is None else old_logprobs,
        logprobs if ref_logprobs is None else ref_logprobs,
        advantages,
        branch,
        weights,
        partial_sums,
        kl,
        clipped,
        gradients,
        len(logprobs),
        beta,
        lower,
        upper,
        delta,
        temperature_pos,
        temperature_neg,
        max_log_ratio,
        LOSS=loss_type,
        HAS_OLD=old_logprobs is not None,
        HAS_REF=ref_logprobs is not None,
        BIAS_CORRECT_KL=bias_correct_kl,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return partial_sums
