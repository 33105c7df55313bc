"""Means that are taken later: over processes, and over micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Metric(NamedTuple):
    """A mean in two parts, 0-d float tensors on the loss's device, so that processes can be summed before dividing."""

    total: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here

    @classmethod
    def over(cls, total: torch.Tensor, count: int) -> Metric:
        """A mean over so many; the number is filled in on the device, since a copy to it would make the host wait."""
        return cls(total, total.new_full((), count))

    def mean(self) -> torch.Tensor:
        """total / count, and 0 where nothing was counted."""
        return self.total / self.count.clamp(min=1)
