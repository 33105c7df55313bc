"""Defines ORPOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base.reference_free_config import ReferenceFreeConfig

if TYPE_CHECKING:
    from trl_fast.losses.reference_free import ORPOLossConfig


@dataclass
class ORPOConfig(ReferenceFreeConfig):
    """Holds the arguments of ORPOTrainer: learning to write, and to prefer, from pairs, without a reference.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta`.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    beta: float = 0.1
    """Weight of the preference, beside the likelihood of prompts and chosen completions; lambda in the paper."""

    def loss_config(self) -> ORPOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.reference_free import ORPOLossConfig

        return ORPOLossConfig(beta=self.beta)
