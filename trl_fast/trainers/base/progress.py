"""Shows a progress bar with the latest metrics, and a table of them at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.console import make_console, progress_columns

# What a table's borders and padding take beside a column's text.
_COLUMN_FRAME = 3
_MOST_COLUMNS = 16
# Rows of the table under the bar: with its header and two bars, ten lines.
_LIVE_ROWS = 7
# What is no metric of the model.
_LEFT_OUT = {"step", "total_flos"}


def metrics_table(rows: list[dict[str, float]], title: str, width: int) -> Table:
    """Makes a table of logged metrics, a column a step: as many of the last as fit, and the first for comparison.

    rows: what Trainer.log was given, plus "step", oldest first. width: of the console, in characters.
    """
    return _table(rows, dict.fromkeys(name for row in rows for name in row), width, title=title, header_style="bold")


def live_table(rows: list[dict[str, float]], first: Sequence[str], width: int) -> Table:
    """Makes the table under the bar, in eight lines: the metrics that tell most.

    first: names of metrics that come before the others.
    """
    logged = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in dict.fromkeys([*first, *logged]) if name in logged and name not in _LEFT_OUT]
    return _table(rows, names[:_LIVE_ROWS], width, box=None, header_style="dim")


def _table(rows: list[dict[str, float]], names: Iterable[str], width: int, **style: Any) -> Table:
    names = [name for name in names if name not in _LEFT_OUT]
    steps: dict[float, dict[str, float]] = {}
    for row in rows:
        if not row.keys().isdisjoint(names):
            steps.setdefault(row["step"], {}).update(row)
    kept = [*steps.values()]
    kept = [*kept[:1], *kept[1:][-_MOST_COLUMNS:]]
    columns = [[f"step {row['step']}", *(_number(row.get(name)) for name in names)] for row in kept]
    widths = [max(map(len, column)) + _COLUMN_FRAME for column in columns]
    left = width - max(map(len, ["metric", *names])) - _COLUMN_FRAME - 1 - sum(widths[:1])
    shown = columns[:1]
    for column, needed in zip(columns[:0:-1], widths[:0:-1], strict=True):
        left -= needed
        if left < 0:
            break
        shown.insert(1, column)
    table = Table(title_justify="left", **style)
    table.add_column("metric", no_wrap=True)
    for column in shown:
        table.add_column(column[0], justify="right", no_wrap=True)
    for index, name in enumerate(names, start=1):
        table.add_row(*map(Text, (name, *(column[index] for column in shown))))
    return table


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class RichProgressCallback(TrainerCallback):
    """Shows a progress bar for training and evaluation, with the metrics that tell most under it, in ten lines.

    At the end a table of all metrics takes their place. Where the output is no terminal, each log is printed as one
    line instead, and no table.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.train_task: TaskID | None = None
        self.eval_task: TaskID | None = None
        self.rows: list[dict[str, float]] = []
        self._first: tuple[str, ...] = ()

    def close(self) -> None:
        """Stops the bar, so that the terminal has its cursor back. After a failure nobody calls on_train_end."""
        live, self.live, self.progress, self.eval_task = self.live, None, None, None
        if live is not None:
            live.stop()

    def _show(self) -> None:
        if self.live is not None and self.progress is not None:
            self.live.update(Group(self.progress, live_table(self.rows, self._first, self.console.width)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts the bar; training may begin anew, with the smaller batch of auto_find_batch_size."""
        self.close()
        if not state.is_world_process_zero:
            return
        self._first = getattr(args, "first_metrics", ())
        self.progress = Progress(*progress_columns(), console=self.console)
        self.train_task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
        if self.console.is_terminal:
            self.live = Live(self.progress, console=self.console, refresh_per_second=4)
            self.live.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Moves the bar."""
        if self.progress is not None and self.train_task is not None:
            self.progress.update(self.train_task, completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: object = None,
        **kwargs: object,
    ) -> None:
        """Moves the evaluation's bar, which exists while an evaluation runs."""
        if self.progress is None or not hasattr(eval_dataloader, "__len__"):
            return
        if self.eval_task is None:
            self.eval_task = self.progress.add_task("evaluating", total=len(eval_dataloader))
        self.progress.advance(self.eval_task)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Takes the evaluation's bar away."""
        if self.progress is not None and self.eval_task is not None:
            self.progress.remove_task(self.eval_task)
            self.eval_task = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Shows a log."""
        if not state.is_world_process_zero or not logs:
            return
        self.rows.append({"step": state.global_step, **logs})
        if self.live is not None:
            self._show()
        else:
            shown = "  ".join(f"{name} {_number(value)}" for name, value in logs.items())
            self.console.print(Text(f"step {state.global_step}: {shown}"), soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Puts the table of all metrics in the place of the bar."""
        was_shown = self.live is not None
        if self.live is not None:
            self.live.transient = True
        self.close()
        if self.rows and was_shown:
            self.console.print(metrics_table(self.rows, "training", self.console.width))


def close_progress(callbacks: list[TrainerCallback]) -> None:
    """Stops the bars among a trainer's callbacks, however its training has ended."""
    for callback in callbacks:
        if isinstance(callback, RichProgressCallback):
            callback.close()
