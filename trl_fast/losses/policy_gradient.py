"""Policy-gradient losses of completions: GRPO and its relatives, from per-token log-probabilities.

Notation: S sequences (completions) with N tokens; A the advantage of a token's sequence; ρ = π(token) / π_old(token),
or what its sequence's tokens have of it: at the level "sequence" the geometric mean (GSPO, arXiv 2507.18071, Eq. 7),
at the level "product" the product, the ratio of whole completions (RLOO, arXiv 2402.14740). A loss is
Σ_t weight[sequence of t] · (term_t + β·kl_t): loss types differ in their terms (`trl_fast.ops.policy_loss` has the
formulas) and in their weights (`sequence_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from trl_fast.ops.policy_loss import MAX_LOG_RATIO, cispo_terms, clip_terms, kl_estimates, policy_loss, sapo_terms
from trl_fast.ops.token_scores import required
from trl_fast.settings.ranges import check_ranges

from .mean_metric import Metric

Rows = torch.Tensor | slice
ALL = slice(None)
LEVELS = ("token", "sequence", "product")
# The lowest log-ratio that VESPO's weighting sees.
_VESPO_FLOOR = math.log(1e-8)
_VESPO_CEILING = 20.0


@dataclass(frozen=True)
class PolicyLossConfig:
    """What to minimise. The fields have the names, meanings and defaults of `GRPOConfig`.

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

    @property
    def upper(self) -> float:
        """ε_high, which is ε unless it is set."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def span(self) -> str:
        """What has to be seen to weigh one token: that "token", its "sequence", or the whole "batch"."""
        if self.top_entropy_quantile < 1:
            return "batch"
        by_sequence = self.has_one_ratio or self.loss_type == "vespo"
        return "sequence" if by_sequence or self.off_policy_mask_threshold is not None else "token"

    @property
    def has_one_ratio(self) -> bool:
        """Whether all tokens of a sequence have the same ρ."""
        return self.importance_sampling_level != "token"


@dataclass(frozen=True, eq=False)
class PolicyTable:
    """What a policy loss reads besides the policy's scores, of N scored tokens in S sequences.

    - `branch` (N,) int64: the sequence of each token; tokens are ordered by sequence.
    - `advantages` (S,) float32.
    - `weights` (S,) float32: what a token of each sequence counts, of `sequence_weights`.
    - `mask` (N,) float32: 1 on tokens that the policy wrote, 0 on those of an environment; None: all are its own.
    - `old_logprobs`, `ref_logprobs`, `sampling_logprobs` (N,) float32: of the policy before the update (None: of the
      present one), of the reference, of the engine that sampled (NaN where it did not say).
    - `importance_ratios` (N,) float32: π_old / π_sampler as it enters the loss, truncated or masked already.
    """

    branch: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sampling_logprobs: torch.Tensor | None = None
    importance_ratios: torch.Tensor | None = None

    @cached_property
    def lengths(self) -> torch.Tensor:
        """How many tokens of each sequence count, (S,) float32."""
        ones = torch.ones_like(self.branch, dtype=torch.float32) if self.mask is None else self.mask
        return self.sums(ones)

    def masked(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Values (R,) of the tokens `rows`, 0 where the policy did not write."""
        return values if self.mask is None else values * self.mask[rows]

    def sums(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums by sequence, (S,), of values (R,) of the tokens `rows`."""
        return values.new_zeros(len(self.advantages)).index_add(0, self.branch[rows], values)

    def totals(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Sums by sequence, (S,), over the tokens that count."""
        return self.sums(self.masked(values, rows), rows)

    def means(self, values: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        """Means by sequence, (S,), over the tokens that count."""
        return self.totals(values, rows) / self.lengths.clamp(min=1)


class TokenScores(Protocol):
    """Per-token values (R,) float32 of the policy."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class PolicyTerms(NamedTuple):
    """What a loss says about tokens (R,).

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
    """Holds what the terms of a loss type read of the tokens `rows` (R,): every tensor is (R,) float32."""

    log_ratio: torch.Tensor
    ratio: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    rows: Rows


_Terms = tuple[torch.Tensor, torch.Tensor | None]


def _clip(tokens: _Tokens, table: PolicyTable, config: PolicyLossConfig) -> _Terms:
    delta = math.inf if config.delta is None else config.delta
    return clip_terms(tokens.ratio, tokens.advantages, 1 - config.epsilon, 1 + config.upper, delta), None


def _cispo(tokens: _Tokens, table: PolicyTable, config: PolicyLossConfig) -> _Terms:
    return cispo_terms(tokens.ratio, tokens.advantages, config.upper, tokens.logprobs), None


def _sapo(tokens: _Tokens, table: PolicyTable, config: PolicyLossConfig) -> _Terms:
    temperatures = (config.sapo_temperature_pos, config.sapo_temperature_neg)
    return sapo_terms(tokens.ratio, tokens.advantages, *temperatures), None


def _vespo(tokens: _Tokens, table: PolicyTable, config: PolicyLossConfig) -> _Terms:
    phi = vespo_weights(tokens.log_ratio.detach(), table, config, tokens.rows)
    return -phi * tokens.advantages * tokens.logprobs, phi


@torch.no_grad()
def vespo_weights(
    log_ratio: torch.Tensor, table: PolicyTable, config: PolicyLossConfig, rows: Rows = ALL
) -> torch.Tensor:
    """φ(w) = e^λ·w^k·e^(−λw) (R,), w the product of a sequence's ρ and importance ratios. VESPO, arXiv 2602.10693.

    k and λ are those for A ≥ 0 and for A < 0. Sums and logarithms are bounded as in TRL 1.16.
    """
    log_w = table.sums(table.masked(log_ratio.clamp(-_VESPO_CEILING, _VESPO_CEILING), rows), rows)
    if table.importance_ratios is not None:
        log_importance = table.importance_ratios[rows].log().clamp(_VESPO_FLOOR, _VESPO_CEILING)
        log_w = log_w + table.sums(log_importance, rows)
    log_w = log_w.clamp(_VESPO_FLOOR, _VESPO_CEILING)
    good = table.advantages >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    rate = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg).clamp(min=1e-4)
    phi = torch.exp(rate + k * log_w - rate * log_w.exp()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return phi[table.branch[rows]]


class LossType(NamedTuple):
    """`terms`: of tokens, their table and the config the terms (R,) and φ; `kernel`: their name in the fused op.

    `weights`: (lengths of the sequences (B,), Window) to what a token of each sequence counts, before accumulation.
    `by_window`: whether that is divided by a whole accumulation window already.
    """

    terms: Callable[[_Tokens, PolicyTable, PolicyLossConfig], _Terms]
    kernel: str | None
    weights: Callable[[torch.Tensor, Window], torch.Tensor]
    by_window: bool = False


@dataclass(frozen=True)
class Window:
    """What normalises a micro-batch.

    tokens: of the window's completions that count, a process's share. accumulation_steps: micro-batches a step,
    1 in evaluation. max_completion_length: tokens allowed.
    """

    tokens: float
    accumulation_steps: int
    max_completion_length: int


def _mean_of_means(lengths: torch.Tensor, window: Window) -> torch.Tensor:
    return 1 / (lengths.clamp(min=1) * len(lengths))


def _mean_over_tokens(lengths: torch.Tensor, window: Window) -> torch.Tensor:
    return (1 / lengths.sum().clamp(min=1)).expand_as(lengths)


def _mean_over_allowed(lengths: torch.Tensor, window: Window) -> torch.Tensor:
    return torch.full_like(lengths, 1 / (len(lengths) * window.max_completion_length))


def _mean_over_window(lengths: torch.Tensor, window: Window) -> torch.Tensor:
    return torch.full_like(lengths, 1 / window.tokens)


def _mean_of_sums(lengths: torch.Tensor, window: Window) -> torch.Tensor:
    return torch.full_like(lengths, 1 / len(lengths))


# GRPO arXiv 2402.03300; Dr. GRPO 2503.20783; DAPO 2503.14476; LUSPO 2602.05261; CISPO 2506.13585; SAPO 2511.20347;
# VESPO 2602.10693; BNPO: the tokens of the local batch.
LOSSES: dict[str, LossType] = {
    "grpo": LossType(_clip, "clip", _mean_of_means),
    "bnpo": LossType(_clip, "clip", _mean_over_tokens),
    "dr_grpo": LossType(_clip, "clip", _mean_over_allowed),
    "dapo": LossType(_clip, "clip", _mean_over_window, by_window=True),
    "luspo": LossType(_clip, "clip", _mean_of_sums),
    "cispo": LossType(_cispo, "cispo", _mean_over_window, by_window=True),
    "sapo": LossType(_sapo, "sapo", _mean_of_means),
    "vespo": LossType(_vespo, None, _mean_over_window, by_window=True),
}


def sequence_weights(loss_type: str, lengths: torch.Tensor, window: Window) -> torch.Tensor:
    """What a token of each sequence of a micro-batch counts in the loss, (B,) float32.

    lengths: (B,) float32, tokens that count, of all sequences, also of those that are left out because their gradient
    is zero.
    """
    kind = LOSSES[loss_type]
    weights = kind.weights(lengths, window)
    return weights if kind.by_window else weights / window.accumulation_steps


def policy_terms(
    logprobs: torch.Tensor,
    table: PolicyTable,
    config: PolicyLossConfig,
    rows: Rows = ALL,
    entropy_mask: torch.Tensor | None = None,
) -> PolicyTerms:
    """The terms of the tokens `rows` (R,); whole sequences, unless `config.span` is "token".

    logprobs: (R,) float32. entropy_mask: (R,), which tokens' policy terms count; the KL term always does.
    """
    advantages = table.advantages[table.branch[rows]]
    old = logprobs.detach() if table.old_logprobs is None else table.old_logprobs[rows]
    log_ratio = logprobs - old
    leveled = log_ratio
    if config.has_one_ratio:
        summary = table.means if config.importance_sampling_level == "sequence" else table.totals
        leveled = summary(log_ratio, rows)[table.branch[rows]]
    ratio = leveled.clamp(max=MAX_LOG_RATIO).exp()
    tokens = _Tokens(log_ratio, ratio, logprobs, advantages, rows)
    terms, phi = LOSSES[config.loss_type].terms(tokens, table, config)
    if config.off_policy_mask_threshold is not None:
        terms = terms * _on_policy(logprobs.detach(), old, table, config.off_policy_mask_threshold, rows)
    if entropy_mask is not None:
        terms = terms * entropy_mask
    if table.importance_ratios is not None and config.loss_type != "vespo":
        terms = terms * table.importance_ratios[rows]
    kl = None
    if config.beta != 0:
        kl = kl_estimates(
            logprobs, required(table.ref_logprobs)[rows], ratio if config.use_bias_correction_kl else None
        )
        terms = terms + config.beta * kl
        kl = kl.detach()
    seen = ratio.detach() if config.delta is None else ratio.detach().clamp(max=config.delta)
    return PolicyTerms(terms, seen, kl, phi)


def _on_policy(
    logprobs: torch.Tensor, old: torch.Tensor, table: PolicyTable, threshold: float, rows: Rows
) -> torch.Tensor:
    """1 where A ≥ 0 or the sequence's mean log(π_sampler / π) is small, else 0. DeepSeek-V3.2, arXiv 2512.02556."""
    sampled = old if table.sampling_logprobs is None else table.sampling_logprobs[rows]
    drift = table.means((sampled - logprobs).nan_to_num(nan=0.0), rows)
    keep = (table.advantages >= 0) | (drift <= threshold)
    return keep[table.branch[rows]].float()


def grpo_loss(
    scores: TokenScores,
    table: PolicyTable,
    config: PolicyLossConfig,
    *,
    entropy_coef: float | None = None,
    entropy_mask: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss (0-d) of N tokens, or with `rows` (R,) the share of those; shares sum to the loss.

    entropy_coef: the weight of a bonus, the mean entropy of the tokens that count, for which `scores.entropy` must be
    differentiable; None: no bonus. entropy_mask: from the entropies (N,) to the tokens (N,) that the policy terms and
    the bonus act on; for `config.top_entropy_quantile`.
    """
    part = ALL if rows is None else rows
    chosen = None if entropy_mask is None else entropy_mask(required(scores.entropy).detach())
    if _kernel_serves(scores.logprobs, table, config, chosen):
        loss = _fused_loss(scores.logprobs, table, config, part)
    else:
        terms = policy_terms(scores.logprobs, table, config, part, chosen).terms
        loss = (table.weights[table.branch[part]] * table.masked(terms, part)).sum()
    if entropy_coef is None:
        return loss
    entropy = required(scores.entropy)
    if chosen is None:
        return loss - entropy_coef * table.masked(entropy, part).sum() / table.lengths.sum().clamp(min=1)
    acted_on = table.masked(chosen, part)
    return loss - entropy_coef * (entropy * acted_on).sum() / acted_on.sum().clamp(min=1)


def _kernel_serves(
    logprobs: torch.Tensor, table: PolicyTable, config: PolicyLossConfig, chosen: torch.Tensor | None
) -> bool:
    """Whether the fused op has all that the loss needs. On a CPU the few operations on [N] vectors cost nothing."""
    plain = config.span == "token" and chosen is None and table.mask is None and table.importance_ratios is None
    has_kernel = LOSSES[config.loss_type].kernel is not None
    return plain and has_kernel and logprobs.is_cuda and logprobs.dtype == torch.float32


def _fused_loss(logprobs: torch.Tensor, table: PolicyTable, config: PolicyLossConfig, rows: Rows) -> torch.Tensor:
    def part(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows]

    kernel = LOSSES[config.loss_type].kernel
    assert kernel is not None  # `_kernel_serves` has asked
    return policy_loss(
        logprobs,
        part(table.old_logprobs),
        table.advantages,
        table.branch[rows],
        table.weights,
        ref_logprobs=part(table.ref_logprobs) if config.beta != 0 else None,
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.upper,
        delta=config.delta,
        loss_type=kernel,
        temperature_pos=config.sapo_temperature_pos,
        temperature_neg=config.sapo_temperature_neg,
        bias_correct_kl=config.use_bias_correction_kl,
    ).loss


class PolicyMetrics(NamedTuple):
    """Under TRL's names, in TRL's order.

    Attributes:
        means: what is logged as it is.
        by_sequence: values (B,) whose extreme is logged, NaN for sequences without tokens that count.
    """

    means: dict[str, Metric]
    by_sequence: dict[str, torch.Tensor]


@torch.no_grad()
def grpo_metrics(
    scores: TokenScores,
    table: PolicyTable,
    config: PolicyLossConfig,
    left_out: torch.Tensor,
) -> PolicyMetrics:
    """The metrics of a micro-batch, left on the device.

    left_out: (B − S,) float32, the tokens that count of the sequences that have no gradient and are not in the table;
    nothing of them is clipped, so that all means but the entropy's are those of the whole micro-batch.
    """
    found = policy_terms(scores.logprobs, table, config)
    counted = table.lengths.sum()
    means = {}
    if found.kl is not None:
        means["kl"] = Metric(table.masked(found.kl).sum(), counted)
    means["entropy"] = Metric(table.masked(required(scores.entropy)).sum(), counted)
    if config.loss_type == "vespo":
        return PolicyMetrics({**means, "vespo/phi_seq_mean": _sequence_mean(required(found.phi), table)}, {})
    if config.loss_type == "sapo":
        return PolicyMetrics(means, {})
    advantages = table.advantages[table.branch]
    if config.loss_type == "cispo":
        clipped = {"cispo_clip_ratio": (found.ratio > config.upper) & (advantages > 0)}
        return PolicyMetrics({**means, **_shares(clipped, table, config, left_out)}, {})
    low = (found.ratio < 1 - config.epsilon) & (advantages < 0)
    high = (found.ratio > 1 + config.upper) & (advantages > 0)
    clipped = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    extremes = {
        name: torch.cat((_by_sequence(flags, table), torch.where(left_out > 0, 0.0, torch.nan)))
        for name, flags in (("clip_ratio/low_min", low), ("clip_ratio/high_max", high))
    }
    return PolicyMetrics({**means, **_shares(clipped, table, config, left_out)}, extremes)


def _shares(
    flags: dict[str, torch.Tensor], table: PolicyTable, config: PolicyLossConfig, left_out: torch.Tensor
) -> dict[str, Metric]:
    """What share of the tokens, or of the sequences where those have one ratio, has a flag (N,)."""
    if config.has_one_ratio:
        sequences = len(table.advantages) + len(left_out)
        return {name: Metric.over(_by_sequence(flag, table).nansum(), sequences) for name, flag in flags.items()}
    count = table.lengths.sum() + left_out.sum()
    return {name: Metric(table.masked(flag.float()).sum(), count) for name, flag in flags.items()}


def _by_sequence(flags: torch.Tensor, table: PolicyTable) -> torch.Tensor:
    """Means (S,) of flags (N,) over the tokens that count; NaN where none does."""
    return table.totals(flags.float()) / table.lengths


def _sequence_mean(values: torch.Tensor, table: PolicyTable) -> Metric:
    """The mean over sequences of values (N,) that are the same for all tokens of one."""
    per_sequence = table.sums(values) / table.sums(torch.ones_like(values)).clamp(min=1)
    return Metric.over(per_sequence.sum(), len(per_sequence))
