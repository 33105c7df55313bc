"""Names the rows of the running state and of the statistics of scored tokens, and holds the arithmetic on them.

A row of logits is read tile by tile. Its *state* holds sums relative to the largest logit so far (online softmax,
Milakov and Gimelshein, arXiv 1805.02867); when every column has been seen, they become its *statistics*. Kernels in
C++, CUDA and Triton use the same numbers for rows and bits (kernels/shared_constants.py).

The sums are those of the *other* classes: the tile that holds a row's target leaves it out, and keeps its logit apart.
Where the model is sure of its target, the others are nothing next to it, and a sum of all would lose them: at a margin
of 17 nats they are one unit in the last place of float32. With the others apart, log p = log σ(margin), with the
margin x_t − log Σ_{j≠t} e^{x_j}, and 1 − p = −expm1(log p) are exact for every margin.

The rows of the state (7, R) float64 are TOP, the largest logit m of the other classes so far; SUM, SUM_X and SUM_SQ,
their sums of e^(u-m), e^(u-m) (u-m) and e^2(u-m); TOTAL, the sum of all logits; TARGET, the target's logit; BEFORE,
the largest logit before the target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_fast.kernels import shared_constants

# Bits of the mask `outputs`: which statistics are computed besides the log-probability.
ENTROPY, LOG_SUM_SQ_PROBS = shared_constants.ENTROPY, shared_constants.LOG_SUM_SQ_PROBS
MEAN_LOGITS, IS_TOP1 = shared_constants.MEAN_LOGITS, shared_constants.IS_TOP1

OUTPUT_BITS = {
    "logprobs": 0,
    "entropy": ENTROPY,
    "log_sum_sq_probs": LOG_SUM_SQ_PROBS,
    "mean_logits": MEAN_LOGITS,
    "is_top1": IS_TOP1,
}

# Rows of the state.
TOP, SUM, SUM_X = shared_constants.TOP, shared_constants.SUM, shared_constants.SUM_X
SUM_SQ, TOTAL = shared_constants.SUM_SQ, shared_constants.TOTAL
TARGET, BEFORE = shared_constants.TARGET, shared_constants.BEFORE
NUM_STATES = shared_constants.NUM_STATES

# Rows of the statistics (7, R) float32, float64 for float64 products.
LSE_ROW, LOGPROB_ROW, ENTROPY_ROW, LOG_SUM_SQ_ROW, MEAN_LOGITS_ROW, IS_TOP1_ROW, LSE_LOW_ROW = range(7)
NUM_STATISTICS = 7


def output_mask(outputs: tuple[str, ...] | list[str]) -> int:
    """Returns the bit mask of the named outputs.

    Raises:
        ValueError: an output name is unknown.
    """
    mask = 0
    for name in outputs:
        if name not in OUTPUT_BITS:
            raise ValueError(f"outputs: unknown name {name!r}; expected names among {sorted(OUTPUT_BITS)}")
        mask |= OUTPUT_BITS[name]
    return mask


def row_coefficients(
    statistics: torch.Tensor,
    vocab_size: int,
    *,
    grad_lse: torch.Tensor | None = None,
    grad_logprobs: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    grad_mean_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the coefficients a, b, d, e (4, R) of the table in row_kernels.py from upstream gradients (R,).

    statistics: (7, R), entropy included if it has a gradient; vocab_size: V. An output without a gradient is None.

    a and b are for lse as it is rounded: with the exact one, lse + low, p (a + b (u - lse - low)) has the factor
    exp(-low). A float32 log-sum-exp of 10000 is off by up to 5e-4, and every probability with it.
    """
    coefficients = statistics.new_zeros((4, statistics.shape[1]))
    a, b, d, e = coefficients
    logprobs, entropy, low = statistics[LOGPROB_ROW], statistics[ENTROPY_ROW], statistics[LSE_LOW_ROW]
    if grad_lse is not None:
        a += grad_lse
        d += grad_lse * logprobs.exp()
    if grad_logprobs is not None:
        a -= grad_logprobs
        d -= grad_logprobs * torch.expm1(logprobs)
    if grad_entropy is not None:
        a -= grad_entropy * entropy
        b -= grad_entropy
        # p (log p + H) of a target without a probability is 0.
        d -= grad_entropy * logprobs.exp() * (logprobs.clamp(min=-1e4) + entropy)
    if grad_mean_logits is not None:
        e += grad_mean_logits / vocab_size
        d += grad_mean_logits / vocab_size
    factor = torch.exp(-low)
    a.sub_(b * low).mul_(factor)
    b.mul_(factor)
    return coefficients


class Upstream(NamedTuple):
    """Holds the derivatives of a loss by the differentiable scores, (N,) each; None where it reads none."""

    lse: torch.Tensor | None
    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    mean_logits: torch.Tensor | None

    def coefficients(self, statistics: torch.Tensor, vocab_size: int, has_unit: bool) -> torch.Tensor | None:
        """Returns the row coefficients (4, N), None if `of_unit_gradient` is all that is needed.

        statistics: (7, N); has_unit: whether the forward pass has kept d logprob / d hidden.
        """
        others = (self.lse, self.entropy, self.mean_logits)
        if has_unit and all(grad is None for grad in others):
            return None
        return row_coefficients(
            statistics,
            vocab_size,
            grad_lse=self.lse,
            grad_logprobs=self.logprobs,
            grad_entropy=self.entropy,
            grad_mean_logits=self.mean_logits,
        )

    def of_unit_gradient(self, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the gradient of hidden (N, H) in its dtype; cache: d logprob / d hidden (N, H)."""
        if self.logprobs is None:
            return None
        # One pass: a GPU rounds what it computes in the cache's dtype as it writes.
        return torch.mul(cache, self.logprobs[:, None], out=cache.new_empty(cache.shape, dtype=dtype))
