"""Computes what self-distillation adds to a divergence: weights of tokens, a ratio, and a loss of sampled tokens.

Its teacher is the model itself after another prompt: SDFT arXiv 2601.19897, SDPO arXiv 2601.20802.
"""

from __future__ import annotations

import torch

from .loss_inputs import sums_by_sequence

# Log-ratios are bounded as in TRL 1.16.
_MAX_LOG_RATIO = 20.0


def mean_weights(counts: torch.Tensor, branch: torch.Tensor, num_sequences: int, num_in_mean: int) -> torch.Tensor:
    """Computes weights (N,) by which a loss is the mean over sequences of their means over the tokens that count.

    counts: (N,) float32, 1 for those tokens, else 0; branch: (N,) int64, which of `num_sequences` a token belongs to;
    num_in_mean: sequences of the mean, also those without a token here.
    """
    lengths = sums_by_sequence(counts, branch, num_sequences).clamp(min=1)
    return counts / (lengths[branch] * num_in_mean)


@torch.no_grad()
def clipped_ratios(logprobs: torch.Tensor, old_logprobs: torch.Tensor, clip: float) -> torch.Tensor:
    """Computes min(π / π_old, clip) (R,) of tokens' log-probabilities (R,), without gradient."""
    return (logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp().clamp(max=clip)


def sampled_token_terms(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """Computes (log π − log π_teacher) log π (R,), whose first factor has no gradient.

    On tokens that π has sampled, the expected gradient is that of the reverse KL(π‖π_teacher).
    """
    return (logprobs - teacher_logprobs).detach() * logprobs
