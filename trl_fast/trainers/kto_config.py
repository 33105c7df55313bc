"""Defines KTOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.choices import TRUNCATION_MODES, check_choice, one_of
from trl_fast.settings.older_names import older_name

from .base.preference_config import PreferenceConfig

if TYPE_CHECKING:
    from trl_fast.losses.kto import KTOLossConfig


@dataclass
class KTOConfig(PreferenceConfig):
    """Holds the arguments of KTOTrainer: learning from single completions that are good or bad.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta`, `loss_type` and the
    two weights, which are explained in `trl_fast.losses.kto`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "kl"),
        *("grad_norm", "learning_rate"),
    )

    train_sampling_strategy: str = one_of(("random", "sequential", "group_by_length"), default="sequential")
    """Order of the training rows: random, sequential or group_by_length.

    loss_type='kto' pairs neighbours for its KL estimate and needs sequential.
    """

    loss_type: str = one_of("trl_fast.losses.kto:LOSSES", default="kto")
    """Loss: kto or apo_zero_unpaired.

    kto holds a completion against an estimate of the KL divergence; apo_zero_unpaired against the reference itself,
    without scoring mismatched completions.
    """

    desirable_weight: float = 1.0
    """Weight of the losses of good completions."""

    undesirable_weight: float = 1.0
    """Weight of the losses of bad completions."""

    # Names of older TRL versions.
    truncation_mode: str | None = older_name("it works; 'keep_start' is what is done without it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.truncation_mode = self.truncation_mode or "keep_start"
        check_choice(self, "truncation_mode", TRUNCATION_MODES)
        needs_kl = self.loss_config().needs_kl
        if needs_kl and self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would tear apart the rows that "
                f"loss_type={self.loss_type!r} pairs with each other for its estimate of the KL divergence; set "
                "'sequential', or loss_type='apo_zero_unpaired'"
            )
        if needs_kl and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size}: loss_type={self.loss_type!r} "
                "estimates the KL divergence from the other completions of a batch; set at least 2"
            )

    def loss_config(self) -> KTOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.kto import KTOLossConfig

        return KTOLossConfig(
            loss_type=self.loss_type,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
