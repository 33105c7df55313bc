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
    """facts: where findings go; tiny: shapes of a rehearsal; deadline: of the phase, by time.monotonic()."""

    device: torch.device
    facts: Facts
    tiny: bool
    deadline: float

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @property
    def seconds_left(self) -> float:
        """Until the phase should have ended."""
        return self.deadline - time.monotonic()

    def late(self, what: str, seconds: float = 0.0) -> bool:
        """Whether fewer than `seconds` are left; if so, the facts say that `what` was left out."""
        if self.seconds_left > seconds:
            return False
        self.facts.skip(what, "no time left")
        return True

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"
