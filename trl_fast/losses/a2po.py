"""Computes the loss and the metrics of A*-PO (arXiv 2505.20686): a regression onto optimal advantages.

S sequences, one completion y of a prompt x each. r is its reward, V*(x) the prompt's optimal value, estimated from the
rewards of the reference policy's completions; β₁ and β₂ are the two temperatures of the KL divergence.
"""

from __future__ import annotations

import math

import torch

from .loss_inputs import ALL, Rows, sums_by_sequence
from .mean_metric import Metric


def optimal_values(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """Computes V*(x) = β₁·log(mean over completions of exp(r / β₁)), (P,) float32. A*-PO, Eq. 4.

    rewards: (P, K) float32 of K completions of each prompt by the reference policy.
    """
    return beta * (torch.logsumexp(rewards / beta, dim=1) - math.log(rewards.shape[1]))


def a2po_loss(
    token_logprobs: torch.Tensor,
    branch: torch.Tensor,
    ref_sequence_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    beta: float,
    rows: Rows = ALL,
) -> torch.Tensor:
    """Computes the mean over sequences of (β₂·(log π(y) − log π_ref(y)) − (r − V*))², 0-d. A*-PO, Eq. 5.

    With `rows` (R,), the numbers of consecutive tokens that are all tokens of some sequences, the answer is their
    share; shares sum to the loss.

    Args:
        token_logprobs: (R,) float32, of the tokens `rows`.
        branch: (N,) int64, the sequence of each token.
        ref_sequence_logprobs: (S,) float32.
        advantages: (S,) float32, r − V*.
        beta: β₂.
    """
    count = len(advantages)
    logprobs = sums_by_sequence(token_logprobs, branch, count, rows)
    present = torch.zeros_like(advantages).index_fill(0, branch[rows], 1.0)
    gaps = beta * (logprobs - ref_sequence_logprobs) - advantages
    return (present * gaps.square()).sum() / count


@torch.no_grad()
def a2po_metrics(
    token_logprobs: torch.Tensor,
    branch: torch.Tensor,
    ref_sequence_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    values: torch.Tensor,
    beta: float,
) -> dict[str, Metric]:
    """Computes the metrics of a micro-batch in TRL's order under TRL's names, but `reward`; left on the device.

    rewards, values: (S,) float32, r and V*; the others as in `a2po_loss`.
    """
    logratios = sums_by_sequence(token_logprobs, branch, len(rewards)) - ref_sequence_logprobs
    vectors = {
        "v_star": values,
        "implicit_reward": beta * logratios,
        "advantage": rewards - values,
    }
    return {name: Metric.over(vector.sum(), len(vector)) for name, vector in vectors.items()}
