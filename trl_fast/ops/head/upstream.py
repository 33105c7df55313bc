"""Holds the gradients that reach a head's scores in backward, and what is computed from them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .plan import UNIT_GRADIENT
from .row_statistics import row_coefficients


class Upstream(NamedTuple):
    """Holds the derivatives of the loss by the differentiable scores, (N,) each; None where it reads none."""

    lse: torch.Tensor | None
    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    mean_logits: torch.Tensor | None

    def suits_unit_gradient(self, keep: int) -> bool:
        """Tells whether what forward has kept, d logprob / d hidden, is all that backward needs."""
        return keep == UNIT_GRADIENT and all(grad is None for grad in (self.lse, self.entropy, self.mean_logits))

    def of_unit_gradient(self, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the gradient of hidden (N, H) in its dtype; cache: d logprob / d hidden (N, H)."""
        return None if self.logprobs is None else (cache * self.logprobs[:, None]).to(dtype)

    def coefficients(self, statistics: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Returns the row coefficients (4, N); statistics: (7, N)."""
        return row_coefficients(
            statistics,
            vocab_size,
            grad_lse=self.lse,
            grad_logprobs=self.logprobs,
            grad_entropy=self.entropy,
            grad_mean_logits=self.mean_logits,
        )
