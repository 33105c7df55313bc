"""Saves the last whole step when a rollout or a reward function fails, so that nothing is lost."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.parallel.agreement import first_failure

from ..base.log_window import LogWindow
from ..checkpoints.random_states import random_states, set_random_states

logger = logging.getLogger(__name__)


class Rescue(TrainerCallback):
    """Leaves a checkpoint of the last whole step where something fails within the next one.

    A step moves the random states, the count of tokens and the metrics before it moves the weights; all are remembered
    after each whole step, and are put back before the checkpoint is written.

    Args:
        window: the count of tokens trained on, and what waits for the next log.
        check_weights: raises where weights are broken; these are not to be saved.
        save: writes a checkpoint of the trainer.

    Attributes:
        steps_before: steps of the run that this one resumed.
    """

    def __init__(self, window: LogWindow, check_weights: Callable[[], None], save: Callable[[], None]) -> None:
        self._window, self._check_weights, self._save = window, check_weights, save
        self.steps_before = 0
        self._args: TrainingArguments | None = None
        self._state: TrainerState | None = None
        self._collected: dict[str, Any] = {}
        self._random: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remembers the run, and how many steps had been made before by the one that is resumed."""
        self._args, self._state = args, state
        self.steps_before = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remembers the random states and what has been collected after a whole step."""
        if self._state is None:  # an evaluation outside of training
            return
        self._random = random_states()
        self._collected = self._window.snapshot()

    # A checkpoint is written after the log and the evaluation of its step.
    on_log = on_evaluate = on_step_end

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Forgets the run: what fails after it has nothing to save."""
        self._state = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Lets what fails within, in any process, fail in all of them, after the last whole step is saved.

        All processes enter and leave together; nothing within waits for another process.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failure = first_failure(failure)
        if failure is None:
            return
        self._save_last_whole_step(failure)
        raise failure

    def _save_last_whole_step(self, failure: Exception) -> None:
        if self._state is None:
            return
        # Broken weights, which cannot generate either, are the cause and are not to be saved.
        self._check_weights()
        step = self._state.global_step
        # The step that was resumed from is saved already.
        if step <= self.steps_before or self._args.save_strategy == "no":
            return
        self._restore()
        self._save()
        saved = (
            f"Step {step} is saved in {self._args.output_dir}; mend the cause and go on with "
            "train(resume_from_checkpoint=True)."
        )
        if sys.version_info >= (3, 11):
            failure.add_note(saved)
        else:  # exceptions have no notes yet
            logger.error(saved)

    def _restore(self) -> None:
        set_random_states(self._random)
        self._window.restore(self._collected)
