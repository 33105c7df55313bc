"""Computes what a token of each sequence counts in a policy-gradient loss, before gradient accumulation.

Every function takes the lengths (B,) float32 of the sequences of a micro-batch, in tokens that count, and returns
weights (B,) float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossNormalizer:
    """Holds the numbers that normalise the loss of a micro-batch.

    step_tokens: tokens that count in the completions of the whole optimizer step, a process's share.
    accumulation_steps: micro-batches a step, 1 in evaluation. max_completion_length: tokens allowed.
    """

    step_tokens: float
    accumulation_steps: int
    max_completion_length: int


def mean_of_sequence_means(lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes weights (B,) by which a loss is the mean over sequences of their means over tokens."""
    return 1 / (lengths.clamp(min=1) * len(lengths))


def mean_over_tokens(lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes weights (B,) by which a loss is the mean over the micro-batch's tokens."""
    return (1 / lengths.sum().clamp(min=1)).expand_as(lengths)


def mean_over_allowed_tokens(lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes weights (B,) by which a loss is the sum over tokens, over as many as the sequences might have had."""
    return torch.full_like(lengths, 1 / (len(lengths) * normalizer.max_completion_length))


def mean_over_step_tokens(lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes weights (B,) by which the losses of a step's micro-batches sum to the mean over its tokens."""
    return torch.full_like(lengths, 1 / normalizer.step_tokens)


def mean_of_sequence_sums(lengths: torch.Tensor, normalizer: LossNormalizer) -> torch.Tensor:
    """Computes weights (B,) by which a loss is the mean over sequences of their sums over tokens."""
    return torch.full_like(lengths, 1 / len(lengths))
