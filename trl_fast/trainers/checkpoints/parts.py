"""Keeps parts of a run's state in its checkpoints, beside what transformers keeps there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_model, save_model

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
    """Keeps a model's weights in a folder of their own.

    Args:
        folder: its name.
        get_model: returns the model, without what was wrapped around it.
    """

    def __init__(self, folder: str, get_model: Callable[[], torch.nn.Module]) -> None:
        self._folder, self._get_model = folder, get_model

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the weights."""
        (folder / self._folder).mkdir(exist_ok=True)
        save_model(self._get_model(), str(folder / self._folder / WEIGHTS_FILE), metadata={"format": "pt"})

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the weights; without them, says that they begin anew."""
        path = folder / self._folder / WEIGHTS_FILE
        if not path.is_file():
            logger.warning(f"resume_from_checkpoint: {path} is not there: these weights begin anew.")
            return
        load_model(self._get_model(), path)
