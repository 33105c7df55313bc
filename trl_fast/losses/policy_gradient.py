"""Computes policy-gradient losses of completions: GRPO and its relatives.

Notation: S sequences (completions) with N tokens; A the advantage of a token's sequence; ρ = π(token) / π_old(token),
or what its sequence's tokens have of it: at the level "sequence" the geometric mean (GSPO, arXiv 2507.18071, Eq. 7),
at the level "product" the product, the ratio of whole completions (RLOO, arXiv 2402.14740). A loss is
Σ_t weight[sequence of t] · (term_t + β·kl_t): loss types differ in their terms (`trl_fast.ops.policy_loss` has the
formulas) and in their weights (`loss_normalization`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from trl_fast.ops import TokenScores
from trl_fast.ops.policy_loss import (
    MAX_LOG_RATIO,
    cispo_terms,
    clip_terms,
    corrected_kl_estimates,
    kl_estimates,
    policy_loss,
    sapo_terms,
)
from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .loss_inputs import ALL, PolicyLossInputs, Rows
from .loss_normalization import (
    LossNormalizer,
    mean_of_sequence_means,
    mean_of_sequence_sums,
    mean_over_allowed_tokens,
    mean_over_step_tokens,
    mean_over_tokens,
)

LEVELS = ("token", "sequence", "product")
# The lowest log-ratio that VESPO's weighting sees.
_VESPO_FLOOR = math.log(1e-8)
_VESPO_CEILING = 20.0


@dataclass(frozen=True)
class PolicyLossConfig:
    """Holds the settings of the loss. The fields have the names, meanings and defaults of `GRPOConfig`.

    Raises:
        ValueError: loss_type or importance_sampling_level is unknown, or a number out of range.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    top_entropy_quantile: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (("loss_type", tuple(LOSSES)), ("importance_sampling_level", LEVELS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(choices)}")
        check_ranges(self)

    @classmethod
    def of(cls, **settings: Any) -> PolicyLossConfig:
        """Returns the settings, checked once: the same object for the same values."""
        try:
            return _checked(tuple(settings.items()))
        except TypeError:
            # What cannot be hashed cannot be right either: the check names it.
            return cls(**settings)

    @property
    def upper(self) -> float:
        """Returns ε_high, which is ε unless it is set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def ratio_bounds(self) -> tuple[float, float]:
        """Returns the ratios between which a token is not clipped; GMPO's ε are of logarithms."""
        if self.loss_type == "gmpo":
            return math.exp(-self.epsilon), math.exp(self.upper)
        return 1 - self.epsilon, 1 + self.upper

    @property
    def scope(self) -> str:
        """Returns what a token's gradient depends on: that "token" alone, its "sequence", or the whole "batch"."""
        if self.top_entropy_quantile < 1:
            return "batch"
        by_sequence = self.has_one_ratio or self.loss_type in ("vespo", "gmpo")
        return "sequence" if by_sequence or self.off_policy_mask_threshold is not None else "token"

    @property
    def has_one_ratio(self) -> bool:
        """Says whether all tokens of a sequence have the same ρ."""
        return self.importance_sampling_level != "token"


@lru_cache(maxsize=16)
def _checked(settings: tuple[tuple[str, Any], ...]) -> PolicyLossConfig:
    return PolicyLossConfig(**dict(settings))


class PolicyTerms(NamedTuple):
    """Holds what a loss says about tokens, each value (R,).

    Attributes:
        terms: before weights and mask, the KL term included. Differentiable.
        ratio: ρ without gradient, as clipping sees it.
        kl: the KL estimate as it is logged, times ρ where the loss multiplies it; None without a reference.
        phi: VESPO's weight, else None.
    """

    terms: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor | None
    phi: torch.Tensor | None


class _Tokens(NamedTuple):
    """Holds what the terms of a loss type read of the tokens `rows` (R,): every tensor is (R,) float32.

    `chosen`: 1 for the tokens that policy terms act on, else 0; None: they act on all.
    """

    log_ratio: torch.Tensor
    ratio: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    rows: Rows
    chosen: torch.Tensor | None


_Terms = tuple[torch.Tensor, torch.Tensor | None]


def _clip(tokens: _Tokens, inputs: PolicyLossInputs, config: PolicyLossConfig) -> _Terms:
    delta = math.inf if config.delta is None else config.delta
    return clip_terms(tokens.ratio, tokens.advantages, *config.ratio_bounds, delta), None


def _cispo(tokens: _Tokens, inputs: PolicyLossInputs, config: PolicyLossConfig) -> _Terms:
    return cispo_terms(tokens.ratio, tokens.advantages, config.upper, tokens.logprobs), None


def _sapo(tokens: _Tokens, inputs: PolicyLossInputs, config: PolicyLossConfig) -> _Terms:
    temperatures = (config.sapo_temperature_pos, config.sapo_temperature_neg)
    return sapo_terms(tokens.ratio, tokens.advantages, *temperatures), None


def _vespo(tokens: _Tokens, inputs: PolicyLossInputs, config: PolicyLossConfig) -> _Terms:
    phi = vespo_weights(tokens.log_ratio.detach(), inputs, config, tokens.rows)
    return -phi * tokens.advantages * tokens.logprobs, phi


def _gmpo(tokens: _Tokens, inputs: PolicyLossInputs, config: PolicyLossConfig) -> _Terms:
    """Computes −A times the geometric mean of a sequence's ratios, each clipped where A holds it back.

    GMPO, arXiv 2507.20673, Eq. 4. It has no kernel: a term needs the sum over its sequence.
    """
    raised = tokens.advantages > 0
    clipped = torch.where(
        raised, tokens.log_ratio.clamp(max=config.upper), tokens.log_ratio.clamp(min=-config.epsilon)
    )
    acts = torch.ones_like(clipped) if tokens.chosen is None else tokens.chosen
    sums, counts = (inputs.masked_sums(values, tokens.rows) for values in (clipped * acts, acts))
    means = sums / counts.clamp(min=1)
    return -means.exp()[inputs.branch[tokens.rows]] * tokens.advantages, None


@torch.no_grad()
def vespo_weights(
    log_ratio: torch.Tensor, inputs: PolicyLossInputs, config: PolicyLossConfig, rows: Rows = ALL
) -> torch.Tensor:
    """Computes φ(w) = e^λ·w^k·e^(−λw) (R,), w the product of a sequence's ρ and importance ratios.

    VESPO, arXiv 2602.10693. k and λ are those for A ≥ 0 and for A < 0. Sums and logarithms are bounded as in TRL 1.16.

    log_ratio: (R,) float32, log ρ of the tokens `rows`.
    """
    log_w = inputs.sums(inputs.masked(log_ratio.clamp(-_VESPO_CEILING, _VESPO_CEILING), rows), rows)
    if inputs.importance_ratios is not None:
        log_importance = inputs.importance_ratios[rows].log().clamp(_VESPO_FLOOR, _VESPO_CEILING)
        log_w = log_w + inputs.sums(log_importance, rows)
    log_w = log_w.clamp(_VESPO_FLOOR, _VESPO_CEILING)[inputs.branch[rows]]
    good = inputs.advantages_of(rows) >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    rate = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg).clamp(min=1e-4)
    return torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


class LossType(NamedTuple):
    """Describes a loss type: the terms of its tokens, their kernel, and how they are averaged.

    `terms`: a function of tokens, inputs and config to the terms (R,) and φ. `kernel`: their name in the fused op.
    `weights`: a function of `loss_normalization`. `over_whole_step`: whether its weights are those of the whole
    optimizer step, so that they are not divided by the number of its micro-batches.
    """

    terms: Callable[[_Tokens, PolicyLossInputs, PolicyLossConfig], _Terms]
    kernel: str | None
    weights: Callable[[torch.Tensor, LossNormalizer], torch.Tensor]
    over_whole_step: bool = False


# GRPO arXiv 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; LUSPO 2602.05261; CISPO 2506.13585; SAPO 2511.20347;
# VESPO 2602.10693; GMPO 2507.20673; BNPO: the tokens of the local batch.
LOSSES: dict[str, LossType] = {
    "grpo": LossType(_clip, "clip", mean_of_sequence_means),
    "bnpo": LossType(_clip, "clip", mean_over_tokens),
    "dr_grpo": LossType(_clip, "clip", mean_over_allowed_tokens),
    "dapo": LossType(_clip, "clip", mean_over_step_tokens, over_whole_step=True),
    "luspo": LossType(_clip, "clip", mean_of_sequence_sums),
    "cispo": LossType(_cispo, "cispo", mean_over_step_tokens, over_whole_step=True),
    "sapo": LossType(_sapo, "sapo", mean_of_sequence_means),
    "vespo": LossType(_vespo, None, mean_over_step_tokens, over_whole_step=True),
    "gmpo": LossType(_gmpo, None, mean_of_sequence_means),
}


def sequence_weights(loss_type: str, lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes what a token of each sequence of a micro-batch counts in the loss, (B,) float32.

    lengths: (B,) float32, tokens that count, of all sequences, also of those that are left out because their gradient
    is zero.
    """
    kind = LOSSES[loss_type]
    weights = kind.weights(lengths, normalizer)
    return weights if kind.over_whole_step else weights / normalizer.accumulation_steps


def policy_terms(
    logprobs: torch.Tensor,
    inputs: PolicyLossInputs,
    config: PolicyLossConfig,
    rows: Rows = ALL,
    entropy_mask: torch.Tensor | None = None,
) -> PolicyTerms:
    """Computes the terms of the tokens `rows` (R,); whole sequences, unless `config.scope` is "token".

    logprobs: (R,) float32. entropy_mask: (R,), which tokens' policy terms count; the KL term always does.
    """
    advantages = inputs.advantages_of(rows)
    old = logprobs.detach() if inputs.old_logprobs is None else inputs.old_logprobs[rows]
    log_ratio = logprobs - old
    leveled = log_ratio
    if config.has_one_ratio:
        summary = inputs.masked_means if config.importance_sampling_level == "sequence" else inputs.masked_sums
        leveled = summary(log_ratio, rows)[inputs.branch[rows]]
    ratio = leveled.clamp(max=MAX_LOG_RATIO).exp()
    tokens = _Tokens(log_ratio, ratio, logprobs, advantages, rows, entropy_mask)
    terms, phi = LOSSES[config.loss_type].terms(tokens, inputs, config)
    if config.off_policy_mask_threshold is not None:
        terms = terms * _on_policy(logprobs.detach(), old, inputs, config.off_policy_mask_threshold, rows)
    if entropy_mask is not None and config.loss_type != "gmpo":
        terms = terms * entropy_mask
    if inputs.importance_ratios is not None and config.loss_type != "vespo":
        terms = terms * inputs.importance_ratios[rows]
    kl = None
    if config.beta != 0:
        kl = _kl_estimates(logprobs, required(inputs.ref_logprobs)[rows], old, ratio, config)
        terms = terms + config.beta * kl
        kl = kl.detach()
    seen = ratio.detach() if config.delta is None else ratio.detach().clamp(max=config.delta)
    return PolicyTerms(terms, seen, kl, phi)


def _kl_estimates(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ratio: torch.Tensor,
    config: PolicyLossConfig,
) -> torch.Tensor:
    """Computes the KL estimates (R,), times ρ (R,) where the config says so; the others are (R,) too."""
    if not config.use_bias_correction_kl:
        return kl_estimates(logprobs, ref_logprobs)
    if not config.has_one_ratio:
        return corrected_kl_estimates(logprobs, ref_logprobs, old_logprobs)
    kl = kl_estimates(logprobs, ref_logprobs) * ratio
    return torch.where(ref_logprobs - logprobs > MAX_LOG_RATIO, kl.detach(), kl)


def _on_policy(
    logprobs: torch.Tensor, old: torch.Tensor, inputs: PolicyLossInputs, threshold: float, rows: Rows
) -> torch.Tensor:
    """Returns 1 where A ≥ 0 or the sequence's mean log(π_sampler / π) is small, else 0.

    Off-policy sequence masking of DeepSeek-V3.2, arXiv 2512.02556.
    """
    sampled = old if inputs.sampling_logprobs is None else inputs.sampling_logprobs[rows]
    drift = inputs.masked_means((sampled - logprobs).nan_to_num(nan=0.0), rows)
    return ((inputs.advantages_of(rows) >= 0) | (drift <= threshold)[inputs.branch[rows]]).float()


def grpo_loss(
    scores: TokenScores,
    inputs: PolicyLossInputs,
    config: PolicyLossConfig,
    *,
    entropy_coef: float | None = None,
    entropy_mask: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the loss (0-d) of N tokens, or with `rows` (R,) the share of those; shares sum to the loss.

    entropy_coef: the weight of a bonus, the mean entropy of the tokens that count, for which `scores.entropy` must be
    differentiable; None: no bonus. entropy_mask: from the entropies (N,) to the tokens (N,) that the policy terms and
    the bonus act on; for `config.top_entropy_quantile`.
    """
    part = ALL if rows is None else rows
    chosen = None if entropy_mask is None else entropy_mask(required(scores.entropy).detach())
    if _kernel_serves(scores.logprobs, inputs, config, chosen):
        loss = _fused_loss(scores.logprobs, inputs, config, part)
    else:
        terms = policy_terms(scores.logprobs, inputs, config, part, chosen).terms
        loss = (inputs.weights[inputs.branch[part]] * inputs.masked(terms, part)).sum()
    if entropy_coef is None:
        return loss
    entropy = required(scores.entropy)
    if chosen is None:
        return loss - entropy_coef * inputs.masked(entropy, part).sum() / inputs.lengths.sum().clamp(min=1)
    acted_on = inputs.masked(chosen, part)
    return loss - entropy_coef * (entropy * acted_on).sum() / acted_on.sum().clamp(min=1)


def _kernel_serves(
    logprobs: torch.Tensor, inputs: PolicyLossInputs, config: PolicyLossConfig, chosen: torch.Tensor | None
) -> bool:
    """Says whether the fused op has all that the loss needs: log-probabilities (N,) float32 on a GPU, and a kernel.

    On a CPU the few operations on [N] vectors cost nothing.
    """
    plain = config.scope == "token" and chosen is None and inputs.mask is None
    plain = plain and inputs.importance_ratios is None and inputs.token_advantages is None
    has_kernel = LOSSES[config.loss_type].kernel is not None
    return plain and has_kernel and logprobs.is_cuda and logprobs.dtype == torch.float32


def _fused_loss(
    logprobs: torch.Tensor, inputs: PolicyLossInputs, config: PolicyLossConfig, rows: Rows
) -> torch.Tensor:
    def part(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows]

    kernel = LOSSES[config.loss_type].kernel
    assert kernel is not None  # `_kernel_serves` has asked
    return policy_loss(
        logprobs,
        part(inputs.old_logprobs),
        inputs.advantages,
        inputs.branch[rows],
        inputs.weights,
        ref_logprobs=part(inputs.ref_logprobs) if config.beta != 0 else None,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.upper,
        delta=config.delta,
        loss_type=kernel,
        temperature_pos=config.sapo_temperature_pos,
        temperature_neg=config.sapo_temperature_neg,
        bias_correct_kl=config.use_bias_correction_kl,
    ).loss
