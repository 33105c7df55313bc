"""Steers the weight of GRPO's entropy bonus, or keeps it fixed."""

from __future__ import annotations

from collections.abc import Callable

import torch


class EntropyController:
    """Moves the weight of the bonus by `delta` a step: up while the entropy is at most `target`, else down.

    Where the entropy, `last_entropy`, was above the target after the last step, no bonus is given at all. Adaptive
    entropy control of Skywork-OR1, arXiv 2505.22312.
    """

    def __init__(self, coefficient: float, *, delta: float, low: float, high: float, target: float) -> None:
        self.coefficient = coefficient
        self._delta, self._low, self._high, self._target = delta, low, high, target
        self.last_entropy = float("inf")
        self._window: torch.Tensor | None = None

    @property
    def applied(self) -> float:
        """Returns the weight that the present step's bonus has."""
        return self.coefficient if self.last_entropy <= self._target else 0.0

    def add(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Adds a micro-batch's entropy: its sum over the tokens that it acts on, and their number, scalars."""
        stats = torch.stack((total, count)).detach()
        self._window = stats if self._window is None else self._window + stats

    def step(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Moves the weight after an optimizer step; `reduce` sums (2,) over processes."""
        assert self._window is not None, "a step has micro-batches"
        total, count = reduce(self._window).tolist()
        self.last_entropy = total / max(count, 1.0)
        rises = self.last_entropy <= self._target
        self.coefficient += self._delta if rises else -self._delta
        self.coefficient = min(max(self.coefficient, self._low), self._high)
        self._window = None
