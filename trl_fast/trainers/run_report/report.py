"""Reports a run: prints lines at its start and end, and keeps run.json and report.html in its output folder."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.console import make_console

from ..checkpoints.folders import checkpoint_name
from .facts import start_lines
from .naming import command_without_secrets, without_secrets
from .outcome import DONE, FAILED, INTERRUPTED, Outcome, model_lines, outcome_lines, peak_memory, resume_command
from .page import write_page
from .reading import read_models, read_run
from .run_file import REPORT_FILE, RUN_FILE, begun_run, earlier_sessions, ended_run, write_run

logger = logging.getLogger(__name__)


def _never_fails(method: Callable[..., None]) -> Callable[..., None]:
    """Turns an error of a report into one line: no run is lost because something could not be told of it."""

    @functools.wraps(method)
    def wrapped(self: RunReport, *args: Any, **kwargs: Any) -> None:
        if not self._is_wanted:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            logger.warning(f"run_report: {type(error).__name__}: {error}. The run itself goes on.")

    return wrapped


class RunReport(TrainerCallback):
    """Reports a trainer's runs, in the main process and unless run_report=False.

    Attributes:
        command: the words of the command line that made the trainer; None: a script did.
        says_end: whether the end is told, on the screen and in files.

    Args:
        trainer: a `BaseTrainer`.
        was_stopped: says whether a signal has ended the training.
    """

    def __init__(self, trainer: Any, was_stopped: Callable[[], bool]) -> None:
        self._trainer, self._was_stopped = trainer, was_stopped
        self.command: list[str] | None = None
        self.says_end = True
        self._is_wanted = False
        self._forget()

    def _forget(self) -> None:
        self._models: Any = None
        self._facts: Any = None
        self._run: dict[str, Any] | None = None
        self._printed: list[tuple[str, str]] = []
        self._checkpoint: str | None = None

    @property
    def _folder(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Reports the training within."""
        self._forget()
        self._is_wanted = self._trainer.args.run_report and self._trainer.is_world_process_zero()
        self._see_models()
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._end(INTERRUPTED)
            raise
        except BaseException as error:
            self._end(f"{FAILED}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            raise
        self._end(INTERRUPTED if self._was_stopped() else DONE)

    @_never_fails
    def _see_models(self) -> None:
        self._models = read_models(self._trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Says what runs; again if training begins anew with the smaller batch of auto_find_batch_size."""
        self._begin()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Remembers the checkpoint that was written."""
        self._checkpoint = str(self._folder / checkpoint_name(state.global_step))

    @_never_fails
    def _begin(self) -> None:
        trainer = self._trainer
        self._facts = read_run(trainer, self._models)
        self._tokens_before = self._num_tokens() or 0
        lines = start_lines(self._facts)
        if lines != self._printed:
            print_lines(lines)
            self._printed = lines
        args = trainer.args
        self._run = begun_run(
            self._facts,
            command=command_without_secrets(self.command or sys.argv),
            settings=without_secrets(args.to_dict()),
            changed=without_secrets(args.changed_settings()),
            data=_describe_data(trainer.train_dataset),
            earlier=earlier_sessions(self._folder) if self._facts.steps.first_step else [],
        )
        self._write(lambda: write_run(self._folder, self._run or {}))
        self._began = time.perf_counter()

    @_never_fails
    def _end(self, status: str) -> None:
        if self._run is None or self._facts is None or not self.says_end:
            return
        outcome = self._outcome(status)
        history = self._trainer.state.log_history
        last = {name: value for log in history for name, value in log.items() if name != "step"}
        self._run = ended_run(self._run, outcome, last)
        files = self._write_files(history)
        if not status.startswith(FAILED):
            print_lines(outcome_lines(outcome, self._facts.forecast, resume_command(self.command), files))

    def _write_files(self, history: list[dict[str, float]]) -> list[str]:
        """Writes run.json and report.html as they are at the end; returns the paths of those that could be."""
        run, first = self._run or {}, self._trainer.args.first_metrics
        writes = {
            RUN_FILE: lambda: write_run(self._folder, run),
            REPORT_FILE: lambda: write_page(self._folder, run, history, first),
        }
        return [str(self._folder / name) for name, write in writes.items() if self._write(write)]

    def _outcome(self, status: str) -> Outcome:
        state, counter = self._trainer.state, self._trainer._tokens
        # A process alone knows them also where the last steps, or all, were not logged.
        tokens = counter.seen if self._trainer.args.world_size == 1 else self._num_tokens()
        peak, memory = peak_memory()
        first = self._facts.steps.first_step
        return Outcome(
            status=status,
            first_step=first,
            steps=state.global_step - first,
            seconds=time.perf_counter() - self._began,
            evaluating=self._evaluating(first),
            tokens=None if tokens is None else int(tokens - self._tokens_before),
            saved=counter.saved,
            peak_bytes=peak,
            peak_of=memory,
            checkpoint=self._checkpoint,
        )

    def _evaluating(self, first_step: int) -> float:
        """Returns the seconds of the evaluations since a step."""
        logs = [log for log in self._trainer.state.log_history if log["step"] > first_step]
        names = {name for log in logs for name in log if name.endswith("_runtime") and name != "train_runtime"}
        return sum(log.get(name, 0.0) for log in logs for name in names)

    def _num_tokens(self) -> float | None:
        """Returns the tokens trained on by all processes, as they were logged last; None if they never were."""
        logged = (log["num_tokens"] for log in reversed(self._trainer.state.log_history) if "num_tokens" in log)
        return next(logged, None)

    @_never_fails
    def say_saved(self, folder: str) -> None:
        """Says where the model of a run that has ended was saved, and what to do with it."""
        if self._run is None or self._trainer.is_in_train:
            return
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        talks = self._facts.kernels.backend is not None
        print_lines(model_lines(folder, is_adapter=isinstance(model, PeftModel), talks=talks))
        self._run = {**self._run, "model_folder": folder}
        self._write(lambda: write_run(self._folder, self._run or {}))

    def _write(self, write: Callable[[], None]) -> bool:
        """Writes a file; says so in one line if it cannot be."""
        try:
            write()
        except OSError as error:
            logger.warning(f"run_report: {self._folder} cannot be written to ({error.strerror or error}).")
            return False
        return True


def print_lines(lines: list[tuple[str, str]]) -> None:
    """Prints lines (label, text): in columns on a terminal, elsewhere each in a line of its own."""
    console = make_console()
    if not console.is_terminal:
        for label, text in lines:
            console.print(Text(f"{label:<8} {text}"), soft_wrap=True, highlight=False)
        return
    table = Table.grid(padding=(0, 1))
    for label, text in lines:
        table.add_row(Text(f"{label:<8}", style="bold"), Text(text))
    console.print(table)


def _describe_data(dataset: object) -> dict[str, Any]:
    rows = len(dataset) if isinstance(dataset, Dataset) else None
    return {"rows": rows, "columns": list(getattr(dataset, "column_names", None) or [])}
