"""Times blocks of code and reports the seconds, as `trl.extras.profiling` does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer
from transformers.integrations import is_mlflow_available, is_trackio_available, is_wandb_available


class ProfilingContext:
    """Times what runs while it is open, and reports the seconds.

    Args:
        name: of the block.
        report_to: where the seconds go: "wandb", "mlflow", "trackio", each if a run of it is on.
        is_main_process: the other processes report nothing.
        step: the step that the seconds belong to.
        metric_prefix: stands before the name in the metric's name.
    """

    def __init__(
        self,
        name: str,
        report_to: Sequence[str],
        is_main_process: bool = True,
        step: int | None = None,
        metric_prefix: str = "profiling/Time taken",
    ) -> None:
        self.name = name
        self.report_to = report_to
        self.is_main_process = is_main_process
        self.step = step
        self.metric_prefix = metric_prefix
        self.started: float | None = None

    def __enter__(self) -> ProfilingContext:
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.started is not None and self.is_main_process:
            self._report({f"{self.metric_prefix}: {self.name}": time.perf_counter() - self.started})

    def _report(self, metrics: dict[str, float]) -> None:
        if "wandb" in self.report_to and is_wandb_available():
            import wandb

            if wandb.run is not None:
                wandb.log(metrics)
        if "mlflow" in self.report_to and is_mlflow_available():
            import mlflow

            if mlflow.active_run() is not None:
                mlflow.log_metrics(metrics, step=self.step)
        if "trackio" in self.report_to and is_trackio_available():
            import trackio

            trackio.log(metrics, step=self.step)


def profiling_context(trainer: Trainer, name: str) -> ProfilingContext:
    """Makes the context of a block of a trainer, named by the trainer's class and the block."""
    report_to: Any = trainer.args.report_to
    return ProfilingContext(
        f"{type(trainer).__name__}.{name}",
        report_to=report_to,
        is_main_process=trainer.accelerator.is_main_process,
        step=trainer.state.global_step,
    )


def profiling_decorator(func: Callable) -> Callable:
    """Times each call of a trainer's method and reports it; a method of another object just runs."""

    @functools.wraps(func)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (hasattr(self, "state") and hasattr(self, "args")):
            return func(self, *args, **kwargs)
        with profiling_context(self, func.__name__):
            return func(self, *args, **kwargs)

    return timed
