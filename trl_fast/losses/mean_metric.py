"""Holds means in two parts, which are divided later: over processes, and over micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Metric(NamedTuple):
    """Holds a mean as total and count, 0-d float tensors on the loss's device, to be summed before dividing."""

    total: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here

    @classmethod
    def over(cls, total: torch.Tensor, count: int) -> Metric:
        """Returns the mean of a total (a float scalar) over `count`.

        The count is filled in on the device, since a copy to it would make the host wait.
        """
        return cls(total, total.new_full((), count))

    def mean(self) -> torch.Tensor:
        """Returns total / count, and 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)
