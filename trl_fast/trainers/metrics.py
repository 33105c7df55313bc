"""Metrics between two logs: kept on the device, reduced over processes once, read once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch


class MetricBuffer:
    """Collects (total, count) pairs of 0-d tensors by name, one a micro-batch.

    The logged value of a name is TRL's: the mean over micro-batches of each one's total / count over all processes.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Adds one micro-batch's metrics; nothing waits for the device."""
        for name, (total, count) in metrics.items():
            self._pairs[name].append(torch.stack((total.detach().float(), count.detach().float())))

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The values since the last call, in the order in which names first came; empties the buffer.

        `reduce` sums a tensor over processes; it is called once, if there is anything.
        """
        if not self._pairs:
            return {}
        lengths = [len(pairs) for pairs in self._pairs.values()]
        totals = reduce(torch.stack([pair for pairs in self._pairs.values() for pair in pairs]))
        means = torch.where(totals[:, 1] > 0, totals[:, 0] / totals[:, 1].clamp(min=1), 0.0)
        values = {name: part.mean() for name, part in zip(self._pairs, means.split(lengths), strict=True)}
        self._pairs.clear()
        names, stacked = list(values), torch.stack(list(values.values())).tolist()
        return dict(zip(names, stacked, strict=True))
