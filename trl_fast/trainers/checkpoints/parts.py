"""Keeps parts of a run's state in its checkpoints, beside what transformers keeps there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from trl_fast.parallel.engines import engine_of
from trl_fast.parallel.weights import set_whole_weights, whole_weights

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"


@runtime_checkable
class CheckpointPart(Protocol):
    """Keeps a part of a run's state; callbacks with these two methods are such parts without more."""

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the state into a checkpoint's folder."""

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the state from a checkpoint's folder; one that lacks it was written by others, or with other settings.

        All processes call this.
        """


class NumbersPart:
    """Keeps numbers of an object in a file.

    Args:
        file: its name.
        owner: the object.
        attributes: the object's attributes by their names in the file.
    """

    def __init__(self, file: str, owner: object, attributes: Mapping[str, str]) -> None:
        self._file, self._owner, self._attributes = file, owner, attributes

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the numbers."""
        numbers = {name: getattr(self._owner, attribute) for name, attribute in self._attributes.items()}
        (folder / self._file).write_text(json.dumps(numbers))

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the numbers; without them, says that they begin anew."""
        path = folder / self._file
        if not path.is_file():
            logger.warning(f"resume_from_checkpoint: {path} is not there: {', '.join(self._attributes)} begin anew.")
            return
        numbers = json.loads(path.read_text())
        for name, attribute in self._attributes.items():
            setattr(self._owner, attribute, numbers[name])


class WeightsPart:
    """Keeps a model's weights, whole, in a folder of their own; all processes take part.

    Args:
        folder: its name.
        model: the model, as the accelerator has prepared it.
        accelerator: the one of the trainer.
        writes: whether this process writes what it has.
    """

    def __init__(self, folder: str, model: torch.nn.Module, accelerator: Accelerator, *, writes: bool) -> None:
        self._folder, self._model, self._accelerator, self._writes = folder, model, accelerator, writes

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the weights."""
        weights = whole_weights(self._accelerator, self._model)
        if not (weights and self._writes):
            return
        (folder / self._folder).mkdir(exist_ok=True)
        # A tied weight is there under each of its names; it is written once.
        once = {weight.data_ptr(): (name, weight.contiguous()) for name, weight in reversed(weights.items())}
        save_file(dict(once.values()), folder / self._folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the weights; without them, says that they begin anew."""
        accelerator, path = self._accelerator, folder / self._folder / WEIGHTS_FILE
        reads = accelerator.is_main_process or not engine_of(accelerator).needs.shards_weights
        weights = load_file(path) if reads and path.is_file() else {}
        if reads and not weights:
            logger.warning(f"resume_from_checkpoint: {path} is not there: these weights begin anew.")
        set_whole_weights(accelerator, self._model, weights)
