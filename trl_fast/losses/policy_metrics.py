"""Computes the metrics of a micro-batch of a policy-gradient method, under TRL's names."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_fast.ops import TokenScores
from trl_fast.ops.token_scores import required

from .loss_inputs import PolicyLossInputs
from .mean_metric import Metric
from .policy_gradient import PolicyLossConfig, policy_terms


class PolicyMetrics(NamedTuple):
    """Holds metrics under TRL's names, in TRL's order.

    Attributes:
        means: what is logged as it is.
        by_sequence: values (B,) whose extreme is logged, NaN for sequences without tokens that count.
    """

    means: dict[str, Metric]
    by_sequence: dict[str, torch.Tensor]


@torch.no_grad()
def grpo_metrics(
    scores: TokenScores,
    inputs: PolicyLossInputs,
    config: PolicyLossConfig,
    left_out: torch.Tensor,
) -> PolicyMetrics:
    """Computes the metrics of a micro-batch of N tokens, left on the device.

    left_out: (B − S,) float32, the tokens that count of the sequences that have no gradient and are not in the inputs;
    nothing of them is clipped, so that all means but the entropy's are those of the whole micro-batch.
    """
    found = policy_terms(scores.logprobs, inputs, config)
    counted = inputs.lengths.sum()
    means = {}
    if found.kl is not None:
        means["kl"] = Metric(inputs.masked(found.kl).sum(), counted)
    means["entropy"] = Metric(inputs.masked(required(scores.entropy)).sum(), counted)
    if config.loss_type == "vespo":
        return PolicyMetrics({**means, "vespo/phi_seq_mean": _sequence_mean(required(found.phi), inputs)}, {})
    if config.loss_type == "sapo":
        return PolicyMetrics(means, {})
    advantages = inputs.advantages_of()
    if config.loss_type == "cispo":
        clipped = {"cispo_clip_ratio": (found.ratio > config.upper) & (advantages > 0)}
        return PolicyMetrics({**means, **_shares(clipped, inputs, config, left_out)}, {})
    least, most = config.ratio_bounds
    low = (found.ratio < least) & (advantages < 0)
    high = (found.ratio > most) & (advantages > 0)
    clipped = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    extremes = {
        name: torch.cat((_by_sequence(flags, inputs), torch.where(left_out > 0, 0.0, torch.nan)))
        for name, flags in (("clip_ratio/low_min", low), ("clip_ratio/high_max", high))
    }
    return PolicyMetrics({**means, **_shares(clipped, inputs, config, left_out)}, extremes)


def _shares(
    flags: dict[str, torch.Tensor], inputs: PolicyLossInputs, config: PolicyLossConfig, left_out: torch.Tensor
) -> dict[str, Metric]:
    """Computes the share of the tokens, or of the sequences where those have one ratio, that have a flag (N,)."""
    if config.has_one_ratio:
        sequences = len(inputs.advantages) + len(left_out)
        return {name: Metric.over(_by_sequence(flag, inputs).nansum(), sequences) for name, flag in flags.items()}
    count = inputs.lengths.sum() + left_out.sum()
    return {name: Metric(inputs.masked(flag.float()).sum(), count) for name, flag in flags.items()}


def _by_sequence(flags: torch.Tensor, inputs: PolicyLossInputs) -> torch.Tensor:
    """Computes means (S,) of flags (N,) over the tokens that count; NaN where none does."""
    return inputs.masked_sums(flags.float()) / inputs.lengths


def _sequence_mean(values: torch.Tensor, inputs: PolicyLossInputs) -> Metric:
    """Computes the mean over sequences of values (N,) that are the same for all tokens of one."""
    per_sequence = inputs.sums(values) / inputs.sums(torch.ones_like(values)).clamp(min=1)
    return Metric.over(per_sequence.sum(), len(per_sequence))
