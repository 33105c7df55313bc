"""Holds what the head says about each scored token: the only thing that losses ever see of the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from .head.row_statistics import ENTROPY_ROW, IS_TOP1_ROW, LOG_SUM_SQ_ROW, LOGPROB_ROW, MEAN_LOGITS_ROW


@dataclass
class TokenScores:
    """Holds the head's results for N scored tokens.

    Attributes:
        logprobs: (N,) float32, log-probability of the target. Differentiable.
        entropy: (N,) float32 or None, entropy of the next-token distribution in nats. Differentiable.
        log_sum_sq_probs: (N,) float32 or None, log of the sum of squared probabilities.
        mean_logits: (N,) float32 or None, mean of the transformed logits over the vocabulary.
        is_top1: (N,) bool or None, whether the target is the first most likely token.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    def present(self) -> dict[str, torch.Tensor]:
        """Returns the fields (N,) that were asked for, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def detach(self) -> TokenScores:
        """Returns the same scores without gradient."""
        return TokenScores(**{name: value.detach() for name, value in self.present().items()})


def token_scores(
    statistics: torch.Tensor,
    outputs: tuple[str, ...] | list[str],
    *,
    logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> TokenScores:
    """Returns the named outputs of statistics (7, N) as TokenScores; the others are None.

    logprobs, entropy: (N,) differentiable ones, in the place of those of the statistics.
    """
    row_of = {"entropy": ENTROPY_ROW, "log_sum_sq_probs": LOG_SUM_SQ_ROW, "mean_logits": MEAN_LOGITS_ROW}
    named = {name: statistics[row] for name, row in row_of.items() if name in outputs}
    if "is_top1" in outputs:
        named["is_top1"] = statistics[IS_TOP1_ROW] > 0.5
    if entropy is not None and "entropy" in outputs:
        named["entropy"] = entropy
    return TokenScores(statistics[LOGPROB_ROW] if logprobs is None else logprobs, **named)


def required(values: torch.Tensor | None) -> torch.Tensor:
    """Returns values (N,) that the head was asked for; raises ValueError if it was not."""
    if values is None:
        raise ValueError("scores lack values that the loss or its metrics read; ask the head for those in `outputs`")
    return values
