"""Estimates how much likelier a prompt is among those of good completions than among those of bad ones.

The underlying distribution matching of BCO, arXiv 2404.04656, section 4.2: a logistic regression on embeddings of
prompts tells the two kinds apart; n of them have d numbers each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class LogisticRegression(NamedTuple):
    """Holds a linear classifier: `weights` (d,) and `intercept` 0-d, float64."""

    weights: torch.Tensor
    intercept: torch.Tensor

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Returns the probability (n,) float64 of the first kind, of features (n, d)."""
        return torch.sigmoid(features.double() @ self.weights + self.intercept)


def fit_logistic(features: torch.Tensor, labels: torch.Tensor) -> LogisticRegression:
    """Fits a classifier to features (n, d) with labels (n,) bool, both kinds present, in float64 on their device.

    It minimises ½·|w|² + Σ s·log(1 + exp(−y·(w·x + b))), y = ±1, where s balances the two kinds: scikit-learn's
    `LogisticRegression(class_weight="balanced")`, which TRL fits.
    """
    x, good = features.detach().double(), labels.double()
    balance = len(good) / 2 / torch.where(labels, good.sum(), (1 - good).sum())
    parameters = x.new_zeros(x.shape[1] + 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        losses = balance * F.binary_cross_entropy_with_logits(logits, good, reduction="none")
        objective = 0.5 * parameters[:-1].square().sum() + losses.sum()
        objective.backward()
        return objective

    with torch.enable_grad():
        optimizer.step(closure)
    found = parameters.detach()
    return LogisticRegression(found[:-1], found[-1])


def density_ratios(probabilities: torch.Tensor, smallest: float, largest: float) -> torch.Tensor:
    """Returns p / (1 − p) within bounds, (n,), of probabilities p (n,) that a prompt is one of good completions."""
    return (probabilities / (1 - probabilities + 1e-8)).clamp(smallest, largest)
