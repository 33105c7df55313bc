"""Lists the phases of a call, in order, with the seconds that each may take."""

from __future__ import annotations

from typing import NamedTuple


class Phase(NamedTuple):
    """Describes a phase: `module` has its function `run`; seconds: at most; least: with less it is not started."""

    name: str
    module: str
    seconds: float
    least: float = 5.0
    arguments: tuple[str, ...] = ()


def step(method: str, library: str, seconds: float, *words: str) -> Phase:
    """Returns the phase of a trainer's steps, in a process of their own."""
    name = " ".join(["step", method, library, *(word.removeprefix("--") for word in words)])
    return Phase(name, "steps", seconds, 12, ("--method", method, "--library", library, *words))


def correctness(heads: float, layers: float, attention: float) -> list[Phase]:
    """Returns the phases of the checks, so that no kind of them takes the time of another."""
    checks = (
        ("heads", heads, ("heads", "fused scores", "many logits")),
        ("layers", layers, ("layers", "losses", "merged attention")),
        ("attention", attention, ("attention", "layouts", "FlexAttention")),
    )
    return [Phase(f"correctness of {what}", "correctness", seconds, 5, names) for what, seconds, names in checks]


_STEPS = [
    step("dpo", "trl_fast", 30, "--host"),
    step("dpo", "trl", 30),
    step("sft", "trl_fast", 25, "--host"),
    step("sft", "trl", 25),
    step("grpo", "trl_fast", 30),
    step("grpo", "trl", 30),
    step("dpo", "trl", 30, "--liger"),
    step("dpo", "trl_fast", 30, "--no_checkpointing"),
    step("dpo", "trl", 30, "--no_checkpointing"),
]

PLANS = {
    "first": [
        Phase("environment", "environment", 20),
        *correctness(70, 40, 45),
        Phase("ceilings", "ceilings", 20),
        Phase("heads", "heads", 85),
        Phase("divergences", "divergences", 40),
        Phase("profiling", "profiling", 20),
        Phase("tuning", "tuning", 35),
        *_STEPS,
        Phase("long context", "long_context", 60, 20),
        Phase("watching", "watching", 90, 20),
    ],
    # After a mend: what may have changed, without what the card alone decides.
    "second": [
        Phase("environment", "environment", 20),
        *correctness(45, 25, 30),
        Phase("heads", "heads", 70),
        Phase("divergences", "divergences", 30),
        Phase("profiling", "profiling", 15),
        *_STEPS[:4],
        Phase("watching", "watching", 60, 20),
    ],
    "rehearsal": [
        *(Phase(name, name, 60, 0) for name in ("environment", "ceilings", "heads", "profiling")),
        *correctness(60, 60, 60),
        *(Phase(name, name, 60, 0) for name in ("divergences", "tuning", "long_context", "watching")),
        *(step(method, "trl_fast", 60, "--host") for method in ("dpo", "sft", "grpo")),
        step("dpo", "trl", 60),
    ],
}
