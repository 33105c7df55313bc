"""Data on which two trainers agree which tokens have a high entropy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from trl_fast.trainers.online.trl_hooks import TRLHooks


@contextmanager
def no_ties(settings: Mapping[str, Any]) -> Iterator[None]:
    """Checks, where settings have a top_entropy_quantile, that rounding does not decide which entropies are high.

    None may be close to the threshold: two trainers' entropies differ in the last digits.
    """
    if "top_entropy_quantile" not in settings:
        yield
        return
    choose = TRLHooks.high_entropy_mask
    seen: list[float] = []

    def watched(self, entropies, mask, threshold):
        counted = entropies[mask.bool()].sort().values
        # The greatest entropy is its own threshold where only it is high.
        others = counted if threshold < 1 else counted[:-1]
        seen.extend((others - counted.quantile(threshold)).abs().tolist() if len(counted) else [])
        return choose(self, entropies, mask, threshold)

    with patch.object(TRLHooks, "high_entropy_mask", watched):
        yield
    assert min(seen) > 1e-4, "choose a quantile without a tie"
