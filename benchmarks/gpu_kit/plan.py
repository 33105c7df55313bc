"""The phases of a call, in order, with the seconds that each may take."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """A phase: `module` has its function `run`; seconds: at most; least: with less it is not started."""

    name: str
    module: str
    seconds: float
    least: float = 5.0
    arguments: tuple[str, ...] = ()


def step(method: str, library: str, seconds: float, *words: str) -> Phase:
    """A trainer's steps, in a process of their own."""
    name = " ".join(["step", method, library, *(word.removeprefix("--") for word in words)])
    return Phase(name, "steps", seconds, 12, ("--method", method, "--library", library, *words))


_STEPS = [
    step("dpo", "trl_fast", 40),
    step("dpo", "trl", 40),
    step("dpo", "trl", 40, "--liger"),
    step("sft", "trl_fast", 30),
    step("sft", "trl", 30),
    step("sft", "trl", 30, "--liger"),
    step("dpo", "trl_fast", 30, "--no_checkpointing"),
    step("dpo", "trl", 30, "--no_checkpointing"),
    step("grpo", "trl_fast", 40),
    step("grpo", "trl", 40),
]

PLANS = {
    "first": [
        Phase("environment", "environment", 20),
        Phase("ceilings", "ceilings", 30),
        Phase("correctness", "correctness", 80),
        Phase("heads", "heads", 90),
        Phase("profiling", "profiling", 25),
        *_STEPS,
    ],
    "second": [
        Phase("environment", "environment", 20),
        Phase("correctness", "correctness", 80),
        Phase("heads", "heads", 100),
        Phase("profiling", "profiling", 25),
        *_STEPS,
    ],
}
