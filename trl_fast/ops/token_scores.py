"""What the head says about each scored token: the only thing that losses ever see of the model."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

# Bits of the row kernels' `outputs` mask (csrc/cpu and kernels/ use the same numbers).
ENTROPY = 1
LOG_SUM_SQ_PROBS = 2
MEAN_LOGITS = 4
IS_TOP1 = 8

OUTPUT_BITS = {
    "logprobs": 0,
    "entropy": ENTROPY,
    "log_sum_sq_probs": LOG_SUM_SQ_PROBS,
    "mean_logits": MEAN_LOGITS,
    "is_top1": IS_TOP1,
}

# Rows of the statistics tensor, shape (7, R) float32.
LSE_ROW, LOGPROB_ROW, ENTROPY_ROW, LOG_SUM_SQ_ROW, MEAN_LOGITS_ROW, IS_TOP1_ROW, LSE_LOW_ROW = range(7)
NUM_STATISTICS = 7


@dataclass
class TokenScores:
    """Per-token results of the head for N scored tokens.

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


def token_scores(statistics: torch.Tensor, outputs: tuple[str, ...] | list[str]) -> TokenScores:
    """The named outputs of statistics (7, N); the others are None."""
    row_of = {"entropy": ENTROPY_ROW, "log_sum_sq_probs": LOG_SUM_SQ_ROW, "mean_logits": MEAN_LOGITS_ROW}
    named = {name: statistics[row] for name, row in row_of.items() if name in outputs}
    if "is_top1" in outputs:
        named["is_top1"] = statistics[IS_TOP1_ROW] > 0.5
    return TokenScores(statistics[LOGPROB_ROW], **named)


def required(values: torch.Tensor | None) -> torch.Tensor:
    """Returns values (N,) that the head was asked for; raises ValueError if it was not."""
    if values is None:
        raise ValueError("scores lack values that the loss or its metrics read; ask the head for those in `outputs`")
    return values


def detached(scores: TokenScores) -> TokenScores:
    """The same scores without gradient."""
    values = (getattr(scores, field.name) for field in fields(scores))
    return TokenScores(*(None if value is None else value.detach() for value in values))  # type: ignore[arg-type]


def output_mask(outputs: tuple[str, ...] | list[str]) -> int:
    """Bit mask of the named outputs.

    Raises:
        ValueError: an output name is unknown.
    """
    mask = 0
    for name in outputs:
        if name not in OUTPUT_BITS:
            raise ValueError(f"outputs: unknown name {name!r}; expected names among {sorted(OUTPUT_BITS)}")
        mask |= OUTPUT_BITS[name]
    return mask
