"""Defines how a run has ended, and the lines that say it: what it cost, where its result is and how to go on."""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .forecast import Forecast
from .quantities import count_text, size_text, time_text

DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"
RESUME_FLAG = "--resume_from_checkpoint"
# The peak where there is no GPU whose memory torch counts.
OF_PROCESS = "memory of the process"


@dataclass(frozen=True)
class Outcome:
    """Describes how a run has ended.

    - `status`: "done", "interrupted", or "failed: " and why.
    - `steps`: trained since `first_step`, in `seconds`, of which `evaluating` went into evaluations.
    - `tokens`: trained on since then, by all processes, as num_tokens counts them; None: not counted.
    - `saved`: the share of padded rows' positions that was not computed, in the main process; None: unknown.
    - `peak_bytes`, `peak_of`: the largest memory of the main process, and which memory.
    - `checkpoint`: the last one, None if there is none.
    """

    status: str
    first_step: int
    steps: int
    seconds: float
    evaluating: float
    tokens: int | None
    saved: float | None
    peak_bytes: int
    peak_of: str
    checkpoint: str | None

    @property
    def step_seconds(self) -> float | None:
        """Returns the mean time of a step in seconds, evaluations left out; None if there was none."""
        return (self.seconds - self.evaluating) / self.steps if self.steps else None

    @property
    def tokens_a_second(self) -> float | None:
        """Returns the tokens a second of all processes, evaluations left out."""
        training = self.seconds - self.evaluating
        return None if self.tokens is None or training <= 0 else self.tokens / training


def peak_memory() -> tuple[int, str]:
    """Returns the largest memory of this process so far, in bytes, and which memory it is: a GPU's, or the CPU's."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), "GPU memory"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, OF_PROCESS


def outcome_lines(
    outcome: Outcome, forecast: Forecast | None, resume: str, files: Sequence[str]
) -> list[tuple[str, str]]:
    """Returns the lines (label, text) at the end of a run.

    resume: what goes on from the last checkpoint. files: what was written about the run.
    """
    label = outcome.status.partition(":")[0]
    text = f"{outcome.steps:,} steps in {time_text(outcome.seconds)}"
    if outcome.evaluating:
        text += f", {time_text(outcome.evaluating)} of them evaluating"
    if outcome.step_seconds is not None:
        text += f" ({time_text(outcome.step_seconds)} a step)"
    speed = outcome.tokens_a_second
    if speed is not None:
        text += f"; {count_text(speed)} tokens a second, {count_text(outcome.tokens or 0)} in all"
    if outcome.saved is not None and round(100 * outcome.saved) > 0:
        text += f", {round(100 * outcome.saved)}% fewer computed than in padded rows"
    memory = f"peak {size_text(outcome.peak_bytes)} ({outcome.peak_of})"
    if forecast is not None and forecast.peak_bytes is not None:
        # The process holds libraries too, an estimate holds tensors alone.
        of_tensors = " of tensors" if outcome.peak_of == OF_PROCESS else ""
        memory += f"; {size_text(forecast.peak_bytes)}{of_tensors} were expected"
    lines = [(label, text), ("memory", memory)]
    if outcome.checkpoint is not None:
        lines.append(("resume", f"{resume}  (from {outcome.checkpoint})" if label != DONE else resume))
    elif label != DONE:
        lines.append(("resume", "there is no checkpoint: the run begins anew (save_strategy, save_steps)"))
    if files:
        lines.append(("report", ", ".join(files)))
    return lines


def model_lines(folder: str, *, is_adapter: bool, talks: bool) -> list[tuple[str, str]]:
    """Returns the lines about a model that was saved.

    is_adapter: whether it is one without its base model. talks: whether it generates text.
    """
    name = shlex.quote(folder)
    lines = [("model", f"saved to {folder} ({'adapter' if is_adapter else 'whole model'})")]
    if talks:
        lines.append(("chat", f"trl-fast chat {name}"))
    if is_adapter:
        lines.append(("merge", f"trl-fast merge {name}"))
    return lines


def resume_command(command: Sequence[str] | None) -> str:
    """Returns what goes on from the last checkpoint: the words of the command line again, or else Python."""
    if command is None:
        return "trainer.train(resume_from_checkpoint=True)"
    words, skips = [], False
    for word in command:
        if not skips and word.partition("=")[0] != RESUME_FLAG:
            words.append(word)
        skips = word == RESUME_FLAG
    return shlex.join([*words, RESUME_FLAG, "true"])
