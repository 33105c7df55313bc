"""Computes the losses and metrics of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_fast.ops import TokenScores
from trl_fast.ops.token_scores import required

from .mean_metric import Metric

# What the losses and metrics read, by the names that `linear_token_loss` knows them under.
OUTPUTS = ("logprobs", "entropy", "is_top1")


def nll_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Computes the negative log-likelihood Σ −log p of tokens (N,), a sum (0-d)."""
    return -logprobs.sum()


def dft_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Computes Σ −sg(p)·log p of tokens (N,), a sum (0-d); sg stops the gradient.

    Dynamic fine-tuning, arXiv 2508.05629.
    """
    return -(logprobs * logprobs.detach().exp()).sum()


TOKEN_LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"nll": nll_loss, "dft": dft_loss}


@torch.no_grad()
def token_metrics(scores: TokenScores) -> dict[str, Metric]:
    """Computes the mean entropy of N scored tokens, in nats, and the share that are the most likely token."""
    count = len(scores.logprobs)
    return {
        "entropy": Metric.over(required(scores.entropy).sum(), count),
        "mean_token_accuracy": Metric.over(required(scores.is_top1).sum(dtype=torch.float32), count),
    }
