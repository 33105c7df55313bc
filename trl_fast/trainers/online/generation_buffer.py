"""Keeps the completions that several micro-batches are made of, also in checkpoints written among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_fast.data.images.inputs import ImageInput
from trl_fast.rollout.samples import Samples

from .metric_recorder import MetricRecorder

logger = logging.getLogger(__name__)

# The name in a checkpoint of TRL's batch.
_BATCH = "batch"


class GenerationSettings(Protocol):
    """Names the arguments that say when completions are made, and which micro-batches they are cut into."""

    save_only_model: bool
    per_device_train_batch_size: int

    @property
    def world_size(self) -> int:
        """Returns the number of processes."""

    @property
    def process_index(self) -> int:
        """Returns this process's number."""

    @property
    def steps_per_generation(self) -> int | None:
        """Returns the micro-batches that one generation serves."""

    @property
    def generate_every(self) -> int:
        """Returns the number of micro-batches after which new completions are made."""

    @property
    def is_on_policy(self) -> bool:
        """Says whether each optimizer step makes new completions."""


class GenerationBuffer(TrainerCallback):
    """Holds one generation's completions, cut into slices that micro-batches read in turn.

    A slice is TRL's batch, a dict, where a subclass of the trainer makes such batches itself. `step` counts the
    micro-batches of the run, `step_time` is the time in seconds of those of the present optimizer step, `slices` are
    this process's, None before the first generation. An optimizer step that ends among the micro-batches of a
    generation leaves the slices to the next one, so a checkpoint has them too.

    samples_class: the kind of samples that slices are.
    """

    def __init__(self, args: GenerationSettings, samples_class: type[Samples] = Samples) -> None:
        self._samples_class = samples_class
        self.step, self.step_time = 0, 0.0
        self.slices: Sequence[Samples] | list[dict[str, Any]] | None = None
        self._every = args.generate_every
        # Where each optimizer step ends a generation, a checkpoint needs none of this.
        self._is_saved = not args.is_on_policy and not args.save_only_model
        self._file = f"generation_{args.process_index}.pt"
        self._settings = [args.world_size, args.per_device_train_batch_size, args.steps_per_generation, self._every]
        self._whole_step: tuple[int, Sequence[Samples] | list[dict[str, Any]] | None] = (0, None)

    @property
    def is_used_up(self) -> bool:
        """Says whether the next micro-batch is one of new completions."""
        return self.slices is None or self.step % self._every == 0

    @property
    def current(self) -> Samples | dict[str, Any]:
        """Returns the completions of the next micro-batch."""
        assert self.slices is not None, "it is filled before it is read"
        return self.slices[self.step % len(self.slices)]

    @contextmanager
    def timed_step(self, micro_batches: int, recorder: MetricRecorder) -> Iterator[None]:
        """Counts the micro-batch that is learned from within; after the last of so many records their step_time."""
        start = time.perf_counter()
        yield
        self.step += 1
        self.step_time += time.perf_counter() - start
        if self.step % micro_batches == 0:
            recorder.record_values({"step_time": self.step_time})
            self.step_time = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Starts anew, unless the run goes on from a checkpoint."""
        if state.global_step == 0:
            self.step, self.slices = 0, None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remembers the slices: a step that fails later leaves a checkpoint of this one."""
        self._whole_step = (self.step, self.slices)

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the slices after the last whole step into a checkpoint's folder; each process its own."""
        if not self._is_saved:
            return
        step, slices = self._whole_step
        left = [] if slices is None or step % self._every == 0 else [_fields(samples) for samples in slices]
        torch.save({"settings": self._settings, "step": step, "slices": left}, folder / self._file)

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the slices of a checkpoint's folder; warns if there are none for this run."""
        self.step, self.slices = 0, None
        if not self._is_saved:
            return
        path = folder / self._file
        with torch.serialization.safe_globals([ImageInput]):
            saved = torch.load(path, weights_only=True) if path.is_file() else None
        if saved is None or saved["settings"] != self._settings:
            found = "is not there" if saved is None else "is of a run with other numbers of processes or completions"
            logger.warning(
                f"resume_from_checkpoint: {path} {found}, so the run goes on with new completions, and prompts that "
                "may not be those of the unbroken run."
            )
            return
        self.step = saved["step"]
        self.slices = [fields.get(_BATCH) or self._samples_class(**fields) for fields in saved["slices"]] or None


def _fields(samples: Samples | dict[str, Any]) -> dict[str, Any]:
    return {_BATCH: samples} if isinstance(samples, dict) else vars(samples)
