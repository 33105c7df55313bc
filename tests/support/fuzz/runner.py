"""Runs cases, one after the other, and prints what they found."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from support.fuzz import (
    attention_trial,
    cross_entropy_trial,
    divergence_trial,
    head_trials,
    layer_trials,
    other_trials,
    product_trials,
)
from support.fuzz.draw import Draw
from support.fuzz.hold import Held
from support.triton_interpreter import interpreted_kernels

# How often each op comes, among all.
TRIALS: dict[str, tuple[int, Callable[[Draw, Held], None]]] = {
    "linear_logprob": (6, head_trials.try_logprob),
    "linear_cross_entropy": (5, cross_entropy_trial.try_cross_entropy),
    "linear_token_loss": (5, head_trials.try_token_loss),
    "linear_divergence": (4, divergence_trial.try_divergence),
    "agreement of passes": (3, head_trials.try_agreement),
    "selective_log_softmax": (5, other_trials.try_selective),
    "pair_loss": (2, other_trials.try_pair_loss),
    "policy_loss": (3, other_trials.try_policy_loss),
    "merge_attention": (1, other_trials.try_merge),
    "row_attention": (3, attention_trial.try_attention),
    "product": (3, product_trials.try_product),
    "linear": (2, product_trials.try_linear),
    "layer": (6, layer_trials.try_layer),
}


@dataclass
class Outcome:
    """Holds what a case was and what it found.

    line: `seed/index`, which repeats it; said: its choices; faults: none if all is well; worst: the largest share of
    what is allowed that an error took.
    """

    line: str
    op: str
    said: str
    faults: list[str]
    worst: float
    seconds: float

    def __str__(self) -> str:
        """Returns the line that repeats the case, its choices and its faults."""
        return "\n    ".join([f"{self.line}  {self.op}: {self.said}", *self.faults])


def run_case(seed: int, index: int, only: str | None = None) -> Outcome:
    """Runs a case within `fuzzing`; an exception is a fault. only: an op's name, in the place of the drawn one."""
    draw, held = Draw(seed, index), Held()
    drawn = draw.choose("op", *(name for name, (times, _) in TRIALS.items() for _ in range(times)))
    op = only or drawn
    began = time.perf_counter()
    try:
        TRIALS[op][1](draw, held)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        held.faults.append(f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})")
    said = ", ".join(f"{name}={value}" for name, value in draw.said.items() if name != "op")
    worst = max(held.worst.values(), default=0.0)
    return Outcome(draw.line, op, said, held.faults, worst, time.perf_counter() - began)


@contextlib.contextmanager
def fuzzing() -> Iterator[None]:
    """Lets Triton kernels run in the interpreter, and torch.empty give NaN: a number that is not written is found."""
    before = torch.are_deterministic_algorithms_enabled()
    with interpreted_kernels(), np.errstate(all="ignore"):
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def table(outcomes: Iterable[Outcome]) -> str:
    """Returns a line for each op: its cases, faults, seconds, and the case that came nearest to what is allowed."""
    outcomes = list(outcomes)
    lines = [f"{'op':24} {'cases':>6} {'faults':>6} {'seconds':>8}   nearest to what is allowed"]
    for op in TRIALS:
        own = [outcome for outcome in outcomes if outcome.op == op]
        if own:
            faults, nearest = sum(bool(x.faults) for x in own), max(own, key=lambda x: x.worst)
            seconds = sum(x.seconds for x in own)
            lines.append(f"{op:24} {len(own):6} {faults:6} {seconds:8.1f}   {nearest.worst:.2f} in {nearest.line}")
    return "\n".join(lines)
