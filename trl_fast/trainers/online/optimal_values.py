"""Keeps what prompts are worth under the reference policy, also in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_FILE = "optimal_values.json"


class OptimalValues:
    """Holds a number for each prompt, by its tokens.

    Attributes:
        hopeless: the prompts of which no completion earned a reward.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, ...], float] = {}
        self.hopeless: set[tuple[int, ...]] = set()

    def __contains__(self, prompt_ids: Sequence[int]) -> bool:
        return tuple(prompt_ids) in self._values

    def __len__(self) -> int:
        return len(self._values)

    def add(self, values: Mapping[tuple[int, ...], tuple[float, bool]]) -> None:
        """Adds values by prompt, each with whether a completion earned a reward."""
        for prompt, (value, has_reward) in values.items():
            self._values[prompt] = value
            if not has_reward:
                self.hopeless.add(prompt)

    def of(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns the values (S,) float32 of prompts.

        Raises:
            ValueError: one is unknown.
        """
        for prompt in prompts:
            if prompt not in self:
                raise ValueError(
                    f"the value of a prompt of {len(prompt)} tokens is unknown: values are estimated before the first "
                    "step, of train_dataset and eval_dataset as the trainer got them; give it such an eval_dataset"
                )
        return torch.tensor([self._values[tuple(prompt)] for prompt in prompts])

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the values."""
        rows: list[Any] = [[list(ids), value, ids not in self.hopeless] for ids, value in self._values.items()]
        (folder / _FILE).write_text(json.dumps(rows))

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the values.

        Raises:
            ValueError: there are none.
        """
        path = folder / _FILE
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint: {path} is not there, and the prompts' values are those of the policy at the "
                "start; begin anew"
            )
        self.add({tuple(ids): (value, has_reward) for ids, value, has_reward in json.loads(path.read_text())})
