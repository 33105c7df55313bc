"""Times contenders in turns, so that a machine whose speed drifts is as fair to one as to another."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.progress import Progress

from .memory import measure_peak

WARM_UP_SECONDS = 0.5


@dataclass
class Contender:
    """Holds something to time. `run` does one step and returns nothing that matters."""

    name: str
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    # What the step is there to produce (gradients): not counted as extra memory.
    result_bytes: int = 0
    # Why it could not be run, if it raised.
    failure: str | None = None

    @property
    def extra_bytes(self) -> int:
        return max(0, self.peak_bytes - self.result_bytes)

    @property
    def median(self) -> float:
        """Returns the median seconds; NaN for a contender that was not run."""
        return statistics.median(self.seconds) if self.seconds else math.nan


def milliseconds(seconds: float) -> str:
    """Returns a time in milliseconds, with three digits: 0.0123, 4.56, 78.9, 1234."""
    if seconds <= 0 or not math.isfinite(seconds):
        return f"{1000 * seconds:g}"
    decimals = max(0, 2 - math.floor(math.log10(1000 * seconds)))
    return f"{1000 * seconds:.{decimals}f}"


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Measures the seconds that one call takes, garbage collected before it."""
    gc.collect()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def first_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Measures the seconds of a call outside a race; a short one again, since the first time is mostly warm-up."""
    first = timed(run, device)
    return min(first, timed(run, device)) if first < WARM_UP_SECONDS else first


def race(
    contenders: list[Contender],
    rounds: int,
    patience: float,
    device: torch.device,
    title: str,
    *,
    keep_going: bool = False,
) -> None:
    """Measures peak memory once (that is the warm-up too), then times `rounds` rounds, each contender once a round.

    A contender that took longer than `patience` seconds in its first timed run is not run again. With `keep_going`,
    nor is one that raised: its `failure` says what, and the others are timed all the same.
    """
    caught = Exception if keep_going else ()
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=len(contenders) * (rounds + 1))
        for number in range(rounds + 1):
            for contender in contenders:
                try:
                    _run_once(contender, number == 0, patience, device)
                except caught as error:
                    contender.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                    contender.seconds.clear()
                progress.advance(task)


def _run_once(contender: Contender, first: bool, patience: float, device: torch.device) -> None:
    if first:
        start = time.perf_counter()
        contender.peak_bytes = measure_peak(contender.run, device).peak_bytes
        elapsed = time.perf_counter() - start
        if elapsed > patience:
            contender.seconds.append(elapsed)
    elif contender.failure is None and (not contender.seconds or max(contender.seconds) <= patience):
        contender.seconds.append(timed(contender.run, device))
