"""Defines what a plan expects of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """Holds what a plan expects of a run on one device.

    - `peak_bytes`: the largest memory in use, in bytes; None: not planned.
    - `step_seconds`: the time of an optimizer step, in seconds; None: not planned.
    - `note`: for which device the numbers are estimates, or why there are none.
    """

    peak_bytes: int | None
    step_seconds: float | None
    note: str
