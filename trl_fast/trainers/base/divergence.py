"""Watches for divergence: names steps whose loss or gradient is not finite, and ends training on broken weights."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.modeling.finite_weights import not_finite
from trl_fast.ops.validation import NotFiniteError

from ..checkpoints.folders import newest_checkpoint

logger = logging.getLogger(__name__)

# Steps between two looks, each of which waits for the device once.
READ_EVERY = 10
# Bad steps in a row that end the training although the weights are still numbers.
PATIENCE = 10
# The same of steps that float16's loss scaling left out: from 65536 it takes 16 of them to come down to 1.
SCALING_PATIENCE = 25


class _Step(NamedTuple):
    number: int
    loss: float
    norm: float
    skipped: bool

    @property
    def is_good(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    def __str__(self) -> str:
        named = (("loss", self.loss), ("gradient's norm", self.norm))
        bad = " and ".join(f"the {name} was {value}" for name, value in named if not math.isfinite(value))
        return f"step {self.number}: {bad}"


class DivergedError(RuntimeError):
    """Tells that weights, losses or gradients have become NaN or infinite for good."""


class DivergenceWatch(TrainerCallback):
    """Looks at the losses and gradient norms of the steps, a few at a time and before anything is saved.

    A bad step that has broken weights ends the training, since no later one can mend them. Otherwise a bad step is
    named once, and only many in a row, or one at the very end, count as a failure; those that float16's loss scaling
    leaves out are normal, and are not named. All processes come to the same decision.

    Besides the trainer's model, the weights of `more_models` are looked at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.more_models: list[torch.nn.Module] = []
        self._forget()

    def _forget(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | float = 0.0
        self._unread: list[tuple[int, bool, torch.Tensor]] = []
        self._bad: list[_Step] = []
        self._warned = False

    def see_loss(self, loss: torch.Tensor) -> None:
        """Takes the loss, a scalar, of a micro-batch; nothing waits for the device."""
        self._losses.append(loss.detach())

    def see_norm(self, norm: torch.Tensor | float | None) -> torch.Tensor | float | None:
        """Takes the norm, a scalar, of a step's gradient, and returns it, whole where FSDP2 holds it in parts."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._norm = 0.0 if norm is None else norm
        return norm

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts anew, and looks at the weights that came from a checkpoint.

        Raises:
            NotFiniteError: those are broken.
        """
        self._forget()
        broken = self._broken_weight() if state.global_step > 0 else None
        if broken is not None:
            raise NotFiniteError(
                f"resume_from_checkpoint: the checkpoint of step {state.global_step} holds weights that are NaN or "
                f"infinite, first {broken!r}; go on from an earlier one"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Keeps what the step's loss and gradient were, and looks at them when it is time."""
        accelerator = self._trainer.accelerator
        device = accelerator.device
        values = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in (self._norm, *self._losses)]
        pair = torch.stack((torch.stack(values[1:]).sum() if values[1:] else values[0], values[0]))
        self._unread.append((state.global_step, accelerator.optimizer_step_was_skipped, pair))
        self._losses, self._norm = [], 0.0
        if len(self._unread) >= READ_EVERY or control.should_save:
            self.check()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Keeps the NaN of one log out of the next: transformers' sum of losses is taken off itself to start anew."""
        if self._trainer.is_in_train and logs is not None and "loss" in logs:
            self._trainer._tr_loss.zero_()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Looks before a checkpoint is begun."""
        if control.should_save:
            self.check()

    def check(self) -> None:
        """Looks at the steps since the last call.

        Raises:
            DivergedError: weights are broken, or too many steps in a row were bad; names the step that began it.
        """
        if not self._unread:
            return
        pairs = torch.stack([pair for *_, pair in self._unread])
        read = self._trainer.accelerator.reduce(pairs, "sum").tolist()
        numbers = zip(self._unread, read, strict=True)
        steps = [_Step(number, loss, norm, skipped) for (number, skipped, _), (loss, norm) in numbers]
        self._unread = []
        has_news = False
        for step in steps:
            self._bad = [] if step.is_good else [*self._bad, step]
            has_news |= not (step.is_good or step.skipped)
        if has_news:
            first = next(step for step in [*self._bad, *steps] if not (step.is_good or step.skipped))
            self._judge(first)
        if len(self._bad) >= (SCALING_PATIENCE if self._bad[-1:] and self._bad[-1].skipped else PATIENCE):
            raise self._error(self._bad[0], f"so it was in all {len(self._bad)} steps up to {self._bad[-1].number}")

    def check_weights(self) -> None:
        """Looks at the steps since the last call, and at the weights, which even a good step may break.

        Raises:
            DivergedError: as in `check`, or weights are broken.
        """
        self.check()
        broken = self._broken_weight()
        if broken is not None:
            step = self._trainer.state.global_step
            raise self._failure(f"step {step}: its update made weights NaN or infinite, first {broken!r}")

    def name_broken_weights(self, folder: str | None) -> None:
        """Says so if weights that somebody saves are broken; this process looks at its own ones."""
        assert self._trainer.model is not None, "what is trained is a model"
        names = not_finite(self._trainer.model)
        if names:
            logger.warning(
                f"The model that is saved to {folder} is broken: {len(names)} parameters hold NaN or infinity, first "
                f"{names[0]!r}."
            )

    def _judge(self, first: _Step) -> None:
        broken = self._broken_weight()
        if broken is not None:
            raise self._error(
                first, f"weights are NaN or infinite since then, first {broken!r}, and none of them was saved"
            )
        if not self._warned:
            self._warned = True
            logger.warning(f"{first}; the weights are still numbers. {PATIENCE} such steps in a row end the training.")

    def finish(self) -> None:
        """Looks at the last steps of a training, and at the weights that it has made.

        Raises:
            DivergedError: as in `check`, or the very last step was bad.
        """
        self.check_weights()
        if self._bad and not self._bad[-1].skipped:
            raise self._error(self._bad[0], "training ended with it")

    def _broken_weight(self) -> str | None:
        """Returns the name of a weight that is NaN or infinite, in any process."""
        assert self._trainer.model is not None, "what is trained is a model"
        models = [self._trainer.model, *self.more_models]
        names = [name for model in models for name in not_finite(model)]
        accelerator = self._trainer.accelerator
        count = torch.tensor(float(len(names)), device=accelerator.device)
        if not accelerator.reduce(count, "sum").item():
            return None
        return names[0] if names else "one of another process"

    def _error(self, step: _Step, outcome: str) -> DivergedError:
        return self._failure(f"{step}; {outcome}")

    def _failure(self, what: str) -> DivergedError:
        output_dir = self._trainer.args.output_dir
        assert output_dir is not None, "the arguments have a default for it"
        try:
            where = f"go on from {newest_checkpoint(output_dir)}"
        except ValueError:
            where = "start again"
        return DivergedError(
            f"{what}. Lower learning_rate or look at the data of that step (TRL_FAST_CHECK=1 names where "
            f"it begins), and {where}."
        )
