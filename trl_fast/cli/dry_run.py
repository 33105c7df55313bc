"""Makes one step of a run and stops: `--dry_run` of the training commands."""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trl_fast.console import make_console
from trl_fast.trainers.checkpoints.output_folder import LOCK_FILE, locked_folder

if TYPE_CHECKING:
    from trl_fast.trainers.base.trainer import BaseTrainer
    from trl_fast.trainers.run_report.forecast import Forecast

GIB = 1 << 30


class OneStep(TrainerCallback):
    """Stops training after one optimizer step, and takes its time.

    Attributes:
        seconds: of the step, with all of its micro-batches and rollouts; None: there was none.
        steps: how many steps the whole run has.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.steps = 0
        self._start = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds, self.steps = time.perf_counter() - self._start, state.max_steps
        control.should_training_stop = True


def peak_memory() -> tuple[int, str]:
    """Returns the largest memory of this process so far in bytes, and whose it is: its GPU's, else the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), f"of {torch.cuda.get_device_name()}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "of this process on the CPU"


@contextlib.contextmanager
def without_new_folders(folder: Path) -> Iterator[None]:
    """Removes a folder, and those above it, that were not there before, unless something is in them by then."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def leaving_nothing(trainer: BaseTrainer) -> Iterator[None]:
    """Lets a trainer write into a folder that is gone afterwards, and report to nobody.

    Raises:
        FolderInUseError: another run uses the output folder.
    """
    args, folder = trainer.args, Path(str(trainer.args.output_dir))
    for callback in get_reporting_integration_callbacks(args.report_to):
        trainer.remove_callback(callback)
    args.eval_strategy, args.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    args.eval_on_start, args.load_best_model_at_end, args.logging_steps = False, False, 1
    with contextlib.ExitStack() as stack:
        if (folder / LOCK_FILE).exists():
            stack.enter_context(locked_folder(str(folder)))
        args.output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="trl_fast_dry_run_"))
        try:
            yield
        finally:
            args.output_dir = str(folder)


def say_dry_run(trainer: BaseTrainer, step: OneStep) -> None:
    """Prints what the step needed, and that nothing is left of it."""
    peak, whose = peak_memory()
    console = make_console(highlight=False)
    console.print(
        f"Dry run of {trainer.method}: 1 of {step.steps:,} steps took {step.seconds:.3g} s (the first one is slower "
        f"than others); peak memory {peak / GIB:.2f} GiB {whose}."
    )
    if trainer.forecast is not None:
        console.print(planned(trainer.forecast))
    console.print("Nothing is saved. Leave --dry_run out to train.")


def planned(forecast: Forecast) -> str:
    """Returns what a plan expects of the run's steps, in a sentence."""
    parts = []
    if forecast.peak_bytes is not None:
        parts.append(f"peak memory {forecast.peak_bytes / GIB:.2f} GiB")
    if forecast.step_seconds is not None:
        parts.append(f"{forecast.step_seconds:.3g} s a step")
    return f"Planned: {', '.join(parts) or 'nothing'}; {forecast.note}."
