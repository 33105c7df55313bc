"""Computes how far the policy was from the engine that sampled, as ratios that enter the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ImportanceRatios(NamedTuple):
    """Holds importance ratios.

    Attributes:
        ratios: (N,) float32, as they enter the loss.
        shown: float32, one a sequence, or one a token that counts: those of the metrics.
    """

    ratios: torch.Tensor
    shown: torch.Tensor


def importance_ratios(
    old_logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    branch: torch.Tensor,
    num_sequences: int,
    *,
    mode: str,
    low: float | None,
    high: float | None,
    counts: torch.Tensor | None = None,
) -> ImportanceRatios:
    """Computes π_old / π_sampler, truncated or masked.

    Truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
    (2025).

    Args:
        old_logprobs, sampling_logprobs: (N,) float32; NaN where the sampler did not say, which gives the ratio 1.
        branch: (N,) int64, the sequence of each token.
        num_sequences: S.
        mode: "sequence_…": one ratio for a sequence, the product of its tokens'; "token_…". "…_truncate": ratios are
            cut to [low, high]; "…_mask": those outside become 0.
        low, high: None for no bound.
        counts: (N,) float32, which tokens count; None: all.
    """
    difference = old_logprobs - sampling_logprobs
    difference = (difference if counts is None else difference * counts).nan_to_num(nan=0.0)
    by_sequence = mode.startswith("sequence")
    if by_sequence:
        difference = difference.new_zeros(num_sequences).index_add(0, branch, difference)
    ratios = difference.exp()
    if mode.endswith("truncate"):
        ratios = ratios.clamp(low, high)
    else:
        outside = torch.zeros_like(ratios, dtype=torch.bool)
        if low is not None:
            outside |= ratios < low
        if high is not None:
            outside |= ratios > high
        ratios = ratios.masked_fill(outside, 0.0)
    if by_sequence:
        return ImportanceRatios(ratios[branch], ratios)
    return ImportanceRatios(ratios, ratios if counts is None else ratios[counts > 0])
