"""Gives a phase what it needs: a device, a deadline, a file for its facts, and whether this is a rehearsal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch

from .facts import Facts
from .gpu_timing import Clock


@dataclass
class Kit:
    """Holds what a phase gets: where facts go, whether shapes are tiny, its deadline by time.monotonic()."""

    device: torch.device
    facts: Facts
    tiny: bool
    deadline: float

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @property
    def seconds_left(self) -> float:
        """Returns the seconds until the phase should have ended."""
        return self.deadline - time.monotonic()

    def late(self, what: str, seconds: float = 0.0) -> bool:
        """Says whether fewer than `seconds` are left; if so, the facts say that `what` was left out."""
        if self.seconds_left > seconds:
            return False
        self.facts.skip(what, "no time left")
        return True

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"
