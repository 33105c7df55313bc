"""Times calls on a GPU: device events, the cache flushed before each, contenders in turns, medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

WARM_UPS, ROUNDS = 3, 10
# A call that takes longer is timed fewer times: a GPU whose clocks have settled varies by less than the rounds cost.
_LONG_MS = 300.0
_LONG_ROUNDS = 3


@dataclass
class Timed:
    """Holds a call's name, the milliseconds of its runs, and the bytes alive beyond those before it."""

    name: str
    run: Callable[[], object]
    ms: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    failure: BaseException | None = None

    @property
    def median(self) -> float:
        """Returns the median milliseconds; infinite if it was not run."""
        return statistics.median(self.ms) if self.ms else float("inf")


class Clock:
    """Times calls on one device; on a CPU by the host's clock, for rehearsals."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Larger than any second-level cache.
        size = 1 << 28 if device.type == "cuda" else 1 << 10
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, run: Callable[[], object]) -> float:
        """Measures the milliseconds of one call, the cache empty before it."""
        self._flush.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, run: Callable[[], object]) -> int:
        """Measures the bytes alive at a call's peak beyond those before it; 0 on a CPU, where they are not counted."""
        if self.device.type != "cuda":
            run()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def race(self, contenders: list[Timed], rounds: int = ROUNDS) -> None:
        """Warms every contender up, then times them in turns. One that raises is dropped with its failure.

        Each round begins with another contender: after a heavy one a GPU's clocks are lower for a while, and whoever
        came next each time was up to a fifth slower.
        """
        gc.collect()
        for contender in contenders:
            try:
                contender.extra_bytes = self.peak(contender.run)
                for _ in range(WARM_UPS - 1):
                    self.once(contender.run)
            except Exception as error:
                contender.failure = error
                self.release()
        for number in range(rounds):
            first = number % max(1, len(contenders))
            for contender in contenders[first:] + contenders[:first]:
                if contender.failure is not None or (number >= _LONG_ROUNDS and contender.median > _LONG_MS):
                    continue
                try:
                    contender.ms.append(self.once(contender.run))
                except Exception as error:
                    contender.failure = error
                    self.release()

    def median(self, run: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Measures the median milliseconds of a call."""
        contender = Timed("", run)
        self.race([contender], rounds)
        if contender.failure is not None:
            raise contender.failure
        return contender.median

    def release(self) -> None:
        """Gives cached memory back, so that what an earlier contender held is there for the next."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
