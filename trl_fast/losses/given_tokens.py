"""Chooses the tokens that a divergence compares where a teacher tells the log-probabilities of a few only.

A teacher's server tells its likeliest tokens and the completion's own one. Forward KL is summed over the first,
reverse KL estimated at the second, and a mixture of both takes both (TRL's server distillation). All other tokens may
be one more class: see `ops.divergence.given`.
"""

from __future__ import annotations

import torch


def compared_tokens(
    likeliest: torch.Tensor, logprobs: torch.Tensor, own: torch.Tensor, own_logprobs: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids (N, C) int64 and log-probabilities (N, C) of the tokens of N places that a divergence compares.

    Args:
        likeliest, logprobs: (N, K), the teacher's likeliest tokens first; −inf is padding.
        own, own_logprobs: (N,), the completion's own tokens.
        beta: 0 is forward KL, over the likeliest; 1 reverse KL, at the own token; between them the likeliest one and
            the own token are compared, which is padding (−inf) where it is the likeliest.
    """
    if beta == 0:
        return likeliest, logprobs
    own, own_logprobs = own[:, None], own_logprobs[:, None]
    if beta == 1:
        return own, own_logprobs
    is_likeliest = own == likeliest[:, :1]
    others = own_logprobs.masked_fill(is_likeliest, float("-inf"))
    return torch.cat([likeliest[:, :1], own], dim=1), torch.cat([logprobs[:, :1], others], dim=1)
