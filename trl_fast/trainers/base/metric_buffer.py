"""Collects metrics between two logs: kept on the device, reduced over processes once, read once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from statistics import fmean

import torch

# A total and a count, 0-d tensors each, by name.
Pair = tuple[torch.Tensor, torch.Tensor]
Recorded = Mapping[str, Pair] | Iterable[tuple[str, Pair]]


class MetricBuffer:
    """Collects (total, count) pairs of 0-d tensors by name, one a micro-batch.

    The logged value of a name is TRL's: the mean over micro-batches of each one's total / count over all processes.
    skip_nan: micro-batches whose value is NaN take no part; a name with no other has the value None.
    optional: names of which micro-batches without a count take no part, instead of counting as 0.
    pooled: names whose value is the mean over all that was counted, whichever micro-batch it was in, if anything was.

    Attributes:
        pairs: what was added since the last `pop`, by name, (2,) float32 each.
    """

    def __init__(
        self, *, skip_nan: bool = False, optional: Collection[str] = (), pooled: Collection[str] = ()
    ) -> None:
        self._skip_nan = skip_nan
        self._optional = {*optional, *pooled}
        self._pooled = pooled
        self.pairs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: Recorded) -> None:
        """Adds one micro-batch's metrics, as pairs where names come more than once; nothing waits for the device."""
        for name, (total, count) in metrics.items() if isinstance(metrics, Mapping) else metrics:
            self.pairs[name].append(torch.stack((total.detach().float(), count.detach().float())))

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | None]:
        """Returns the values since the last call, in the order in which names first came; empties the buffer.

        `reduce` sums a tensor (M, 2) over processes; it is called once, if there is anything.
        """
        if not self.pairs:
            return {}
        pairs = iter(reduce(torch.stack([pair for pairs in self.pairs.values() for pair in pairs])).tolist())
        found = []
        for name, recorded in self.pairs.items():
            own = list(islice(pairs, len(recorded)))
            if name in self._pooled:
                own = [[sum(totals) for totals in zip(*own, strict=True)]]
            means = [total / max(count, 1) if count > 0 else None for total, count in own]
            if name not in self._optional:
                means = [0.0 if mean is None else mean for mean in means]
            first = next((index for index, mean in enumerate(means) if mean is not None), None)
            if first is not None:
                found.append((first, name, self._mean([mean for mean in means if mean is not None])))
        self.pairs.clear()
        return {name: value for _, name, value in sorted(found, key=lambda entry: entry[0])}

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what has been collected since the last `pop`: by name, (n, 2) of n micro-batches."""
        return {name: torch.stack(pairs) for name, pairs in self.pairs.items() if pairs}

    def restore(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Puts what `state` has returned, tensors (n, 2), in the place of what has been collected."""
        self.pairs.clear()
        self.pairs.update({name: list(pairs.to(device).unbind()) for name, pairs in state.items()})

    def _mean(self, values: list[float]) -> float | None:
        if self._skip_nan:
            values = [value for value in values if not math.isnan(value)]
        return fmean(values) if values else None
