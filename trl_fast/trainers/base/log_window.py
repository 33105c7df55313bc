"""Keeps what has been collected since the last log, so that a resumed run logs what the unbroken one would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..run_report.token_counts import TokenCounter
from .metric_buffer import MetricBuffer

# One a process.
_FILE = "log_window_{}.pt"


class LogWindow(TrainerCallback):
    """Carries losses, metrics and the count of tokens over to the run that goes on from a checkpoint.

    Args:
        trainer: sums its losses up between logs.
        tokens: the count of tokens trained on; begins anew in each training.
        buffer: returns what collects metrics in training.
    """

    def __init__(self, trainer: Trainer, tokens: TokenCounter, buffer: Callable[[], MetricBuffer]) -> None:
        self._trainer, self._tokens, self._buffer = trainer, tokens, buffer
        self._loaded: dict[str, Any] | None = None

    def snapshot(self) -> dict[str, Any]:
        """Returns the present state: tensors, numbers and names."""
        trainer = self._trainer
        return {
            "processes": trainer.args.world_size,
            "tokens": self._tokens.seen,
            "loss": trainer._tr_loss.detach().clone(),
            "logged_at": trainer._globalstep_last_logged,
            "metrics": self._buffer().state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts a snapshot in the place of the present state."""
        device = self._trainer.accelerator.device
        self._tokens.seen = state["tokens"]
        self._trainer._tr_loss.copy_(state["loss"])
        self._trainer._globalstep_last_logged = state["logged_at"]
        self._buffer().restore(state["metrics"], device)

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the state into a checkpoint's folder; each process its own."""
        torch.save(self.snapshot(), folder / _FILE.format(self._trainer.args.process_index))

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the state; with another number of processes only the count of tokens goes on, in the first."""
        args = self._trainer.args
        files = [torch.load(path, map_location="cpu", weights_only=True) for path in folder.glob(_FILE.format("*"))]
        self._loaded = None
        if files and files[0]["processes"] == args.world_size == len(files):
            path = folder / _FILE.format(args.process_index)
            self._loaded = torch.load(path, map_location="cpu", weights_only=True)
        elif files and args.process_index == 0:
            step = self._trainer.state.global_step
            self._loaded = {"tokens": sum(file["tokens"] for file in files), "loss": torch.zeros(()), "metrics": {}}
            self._loaded["logged_at"] = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Takes over what was read from a checkpoint, when transformers has set its own sums to nothing."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self._tokens.seen = 0 if state.global_step == 0 else self._tokens.seen
            return
        self.restore(loaded)
        # The training's mean loss is that of its own steps.
        self._trainer._total_loss_scalar -= loaded["loss"].item()
