"""Computes the scores s(r) of log-ratios r under f-divergences: s(r) = f'(e^r) up to a constant. arXiv 2309.16240.

The constant cancels in the difference of two scores. Every function takes log-ratios (P,) float32 and returns (P,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from trl_fast.ops.stable_functions import expm1

# Scores, and differences of scores, then stay finite in float32.
_LARGEST_EXPONENT = 80


def reverse_kl_score(logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns r (P,)."""
    return logratios


def forward_kl_score(logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes 1 − e^(−r), (P,). The exponent is capped at 80: the difference of two infinite scores is NaN."""
    return -expm1((-logratios).clamp(max=_LARGEST_EXPONENT))


def js_divergence_score(logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes log(2·e^r / (1 + e^r)) = log 2 + log σ(r), (P,)."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence_score(logratios: torch.Tensor, alpha: float) -> torch.Tensor:
    """Computes (e^((α−1)·r) − 1) / (α − 1), (P,); r in the limit α = 1.

    The exponent is capped at 80, as in TRL.
    """
    power = alpha - 1
    if abs(power) < 1e-6:
        return logratios
    return expm1((power * logratios).clamp(max=_LARGEST_EXPONENT)) / power


F_DIVERGENCES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "reverse_kl": reverse_kl_score,
    "forward_kl": forward_kl_score,
    "js_divergence": js_divergence_score,
    "alpha_divergence": alpha_divergence_score,
}
