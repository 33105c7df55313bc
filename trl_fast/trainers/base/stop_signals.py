"""Ends training on Ctrl-C and SIGTERM with a checkpoint, after the step that is being made."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.parallel.agreement import largest_over_ranks

from ..checkpoints.folders import checkpoint_name

logger = logging.getLogger(__name__)

# Seconds after which processes tell each other of signals; a process alone looks after each step.
TELL_EVERY = 2.0
# Exit codes of a program that a signal has ended.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class StopSignals(TrainerCallback):
    """Listens to Ctrl-C and SIGTERM while a trainer trains, where nobody else does.

    The first signal asks for a checkpoint at the end of the step; a second one ends the training at once. Without
    checkpoints (save_strategy="no") the first does.

    Args:
        accelerator: tells processes of each other's signals.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received: signal.Signals | None = None
        self._saves = False
        self._checkpoint: str | None = None
        self._step_began = 0.0
        self._steps_to_tell = 1

    @property
    def has_stopped(self) -> bool:
        """Says whether a signal has asked for the end of the training."""
        return self._received is not None

    @contextmanager
    def caught(self, *, saves: bool) -> Iterator[None]:
        """Catches signals within, in the main thread; a signal that has ended the training is raised at the end.

        saves: whether there may be a checkpoint.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            SystemExit: after SIGTERM, with the exit code 143.
        """
        self._received, self._saves, self._checkpoint, self._steps_to_tell = None, saves, None, 1
        replaced: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
            for number, handler in usual.items():
                if signal.getsignal(number) == handler:
                    replaced[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)
        # One that came in the last steps is not told yet.
        last = largest_over_ranks(int(self._received or 0))
        self._received = signal.Signals(last) if last else None
        if self._received is not None:
            if self._checkpoint is not None and self._accelerator.is_main_process:
                logger.warning(f"{self._received.name}: training has ended; go on from {self._checkpoint}.")
            self._end()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._received is not None or not self._saves:
            first, self._received = self._received, signal.Signals(number)
            why = "" if first is not None else ", since save_strategy='no'"
            logger.warning(f"{name}: training ends at once; no checkpoint is written{why}.")
            self._end()
        self._received = signal.Signals(number)
        logger.warning(f"{name}: training ends with a checkpoint after this step; a second signal ends it at once.")

    def _end(self) -> None:
        if self._received is signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts a step's clock."""
        self._step_began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Asks for a checkpoint and the end, if a signal has come to any process."""
        if self._was_asked():
            self._checkpoint = os.path.join(str(args.output_dir), checkpoint_name(state.global_step))
            control.should_save = control.should_training_stop = True

    def _was_asked(self) -> bool:
        if self._accelerator.num_processes == 1:
            return self._received is not None
        self._steps_to_tell -= 1
        if self._steps_to_tell > 0:
            return False
        number = 0 if self._received is None else int(self._received)
        own = torch.tensor([[number, time.perf_counter() - self._step_began]], device=self._accelerator.device)
        every = self._accelerator.gather(own).cpu()
        self._steps_to_tell = max(1, int(TELL_EVERY / max(every[:, 1].max().item(), 1e-3)))
        number = int(every[:, 0].max().item())
        if number:
            self._received = signal.Signals(number)
        return bool(number)
