"""Lets all processes stop, save and evaluate at the same step, where a callback asks for it in one of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.parallel.agreement import is_alone, largest_over_ranks

_STOPS = ("should_training_stop", "should_epoch_stop")
_FLAGS = (*_STOPS, "should_save", "should_evaluate", "should_log")
# Callbacks of these packages ask for the same in all processes.
_PACKAGES = ("transformers.", "trl_fast.")


class AgreedControl(TrainerCallback):
    """Does in all processes what a user's callback asks for in one: else those that go on wait for it without end.

    At the end of a step, and after evaluating and saving, the processes tell each other; unless all callbacks are
    those of transformers and trl_fast, and there is no compute_metrics. A stop that is asked for between steps, such
    as in `on_log`, waits for the end of the next step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._tells = False
        self._agreed: set[str] = set()
        self._asked: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Looks for callbacks of the user's, and goes behind them."""
        handler = self._trainer.callback_handler
        others = [callback for callback in handler.callbacks if callback is not self]
        handler.callbacks = [*others, self]
        asks = any(not type(callback).__module__.startswith(_PACKAGES) for callback in others)
        # EarlyStoppingCallback reads what it computes.
        asks = asks or self._trainer.compute_metrics is not None
        self._tells = not is_alone() and bool(largest_over_ranks(int(asks)))
        self._agreed, self._asked = set(), set()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Forgets what the last step's end came to."""
        self._agreed = set()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks in this process for what is asked for in any."""
        if not self._tells:
            return
        for name in self._asked:
            setattr(control, name, True)
        own = torch.tensor([float(getattr(control, name)) for name in _FLAGS], device=self._trainer.accelerator.device)
        every = self._trainer.accelerator.reduce(own, "sum").tolist()
        for name, count in zip(_FLAGS, every, strict=True):
            setattr(control, name, count > 0)
        self._agreed = {name for name in _STOPS if getattr(control, name)}
        self._asked = set()

    on_epoch_end = on_evaluate = on_save = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Keeps a stop that this process alone may have asked for until the end of the next step."""
        if not self._tells:
            return
        for name in _STOPS:
            if getattr(control, name) and name not in self._agreed:
                self._asked.add(name)
                setattr(control, name, False)

    on_substep_end = on_log
