"""Keeps the mean of all numbers that a run has seen."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

FILE = "running.json"


class Mean(NamedTuple):
    """Holds a mean and how many numbers it is of, 0-d float32."""

    mean: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here

    def with_values(
        self, values: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda value: value
    ) -> Mean:
        """Returns the mean with more values, any shape, those that are NaN left out; without gradient.

        reduce: sums a tensor over processes.
        """
        values = values.detach().float()
        total, number = reduce(torch.stack([values.nansum(), values.isnan().logical_not().sum().float()])).unbind()
        count = self.count.to(values.device) + number
        mean = self.mean.to(values.device)
        return Mean(mean + (total - number * mean) / count.clamp(min=1), count)


class RunningMean:
    """Holds the mean of a run's numbers so far, on the device: TRL's `running`. It is a part of checkpoints."""

    def __init__(self) -> None:
        self.state = Mean(torch.zeros(()), torch.zeros(()))

    @property
    def mean(self) -> float:
        """Returns the mean; 0 before there is a number."""
        return float(self.state.mean)

    @property
    def count(self) -> float:
        """Returns how many numbers it is of."""
        return float(self.state.count)

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes both."""
        (folder / FILE).write_text(json.dumps({"mean": self.mean, "count": self.count}))

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads both, also of TRL's checkpoints; without them, says that the mean begins anew."""
        path = folder / FILE
        if not path.is_file():
            logger.warning(f"resume_from_checkpoint: {path} is not there: the mean of rewards begins anew.")
            return
        numbers = json.loads(path.read_text())
        self.state = Mean(*(torch.tensor(float(numbers[name])) for name in ("mean", "count")))
