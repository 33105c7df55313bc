"""Defines BCOConfig: the arguments and defaults of TRL's last version that had it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.choices import TRUNCATION_MODES, check_choice, one_of
from trl_fast.settings.older_names import older_name

from .base.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from trl_fast.losses.bco import BCOLossConfig


@dataclass
class BCOConfig(PreferenceConfig):
    """Holds the arguments of BCOTrainer: learning from single completions that are good or bad.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta`, which is explained
    in `trl_fast.losses.bco`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "delta"),
        *("grad_norm", "learning_rate"),
    )

    learning_rate: float = 5e-7
    """Initial learning rate of AdamW."""

    train_sampling_strategy: str = one_of(("random", "sequential", "group_by_length"), default="sequential")
    """Order of the training rows: random, sequential or group_by_length. TRL's is always sequential."""

    prompt_sample_size: int = 1024
    """With embedding_func: how many prompts of good, and of bad completions the classifier is fitted to at most."""

    min_density_ratio: float = 0.5
    """With embedding_func: the least weight of a bad completion."""

    max_density_ratio: float = 10.0
    """With embedding_func: the largest weight of a bad completion."""

    # Names of older TRL versions.
    truncation_mode: str | None = older_name("it works; 'keep_start' is what is done without it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.truncation_mode = self.truncation_mode or "keep_start"
        check_choice(self, "truncation_mode", TRUNCATION_MODES)
        if self.min_density_ratio > self.max_density_ratio:
            raise ValueError(
                f"min_density_ratio={self.min_density_ratio} is above max_density_ratio={self.max_density_ratio}; "
                "swap them"
            )

    def loss_config(self) -> BCOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.bco import BCOLossConfig

        return BCOLossConfig(beta=self.beta)
