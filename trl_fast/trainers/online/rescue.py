"""A failure within a step leaves a checkpoint of the last whole one, so that nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.callbacks import TokenCounter


class WholeStep(TrainerCallback):
    """What a step moves before its weights do, as it was after the last whole one: tokens seen and random states."""

    def __init__(self, tokens: TokenCounter) -> None:
        self.tokens = tokens
        self.steps_before = 0
        self._seen = 0
        self._random: tuple | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remembers how many steps had been made before, by the run that is resumed."""
        self.steps_before = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remembers them."""
        on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu)
        self._seen = self.tokens.seen

    # A checkpoint is written after the evaluation of its step.
    on_evaluate = on_step_end

    def restore(self) -> None:
        """Puts them back."""
        in_python, in_numpy, in_torch, on_gpu = self._random
        random.setstate(in_python)
        np.random.set_state(in_numpy)
        torch.set_rng_state(in_torch)
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
        self.tokens.seen = self._seen


class Rescue:
    """The part of an online trainer that saves what there is when a reward function or an engine fails."""

    def start(self, **kwargs: Any) -> None:
        """As in the base."""
        super().start(**kwargs)
        self._whole_step = WholeStep(self._tokens)
        self.add_callback(self._whole_step)

    @contextmanager
    def _rescue(self) -> Iterator[None]:
        """What fails within, in any process, fails in all of them, and training leaves its last whole step saved.

        All processes enter and leave together; nothing within waits for another process.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = gather_object([None if failure is None else f"{type(failure).__name__}: {failure}"])
        failed = [process for process, message in enumerate(messages) if message is not None]
        if not failed:
            return
        failure = failure or RuntimeError(f"process {failed[0]} failed: {messages[failed[0]]}")
        self._save_last_whole_step(failure)
        raise failure

    def _save_last_whole_step(self, failure: Exception) -> None:
        if self.is_in_train:
            # Broken weights, which cannot generate either, are the cause and are not to be saved.
            self._divergence.check()
        step = self.state.global_step
        # What was resumed from is there already.
        is_new = self.is_in_train and step > self._whole_step.steps_before
        if not is_new or self.args.save_strategy == "no":
            return
        self._whole_step.restore()
        self._save_checkpoint(self.model, trial=None)
        failure.add_note(
            f"Step {step} is saved in {self.args.output_dir}; mend the cause and go on with "
            "train(resume_from_checkpoint=True)."
        )
