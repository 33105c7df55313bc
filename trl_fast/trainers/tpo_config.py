"""Defines TPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.choices import one_of

from .base.reference_free_config import ReferenceFreeConfig

if TYPE_CHECKING:
    from trl_fast.losses.reference_free import TPOLossConfig


@dataclass
class TPOConfig(ReferenceFreeConfig):
    """Holds the arguments of TPOTrainer: learning from pairs with a gold completion, without a reference policy.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta`, `loss_type` and
    `tpo_alpha`, which are explained in `trl_fast.losses.reference_free`.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"),
        *("grad_norm", "learning_rate", "eval_loss"),
    )

    learning_rate: float = 5e-7
    """Initial learning rate of AdamW."""

    loss_type: str = one_of("trl_fast.losses.reference_free:TPO_LOSSES", default="sigmoid")
    """Loss of a pair: sigmoid, hinge, ipo or tpo-l.

    ipo and tpo-l read the mean log-probability of a token, the others the sum.
    """

    beta: float = 0.01
    """How much the margin between chosen and rejected weighs; of ipo, the inverse of the margin that is aimed at."""

    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be flipped: for sigmoid and tpo-l."""

    tpo_alpha: float = 1.0
    """Weight of the likelihood of gold completions. 0: none; they are then not computed."""

    tpo_l_gamma: float = 0.5
    """The margin that loss_type='tpo-l' aims at."""

    def loss_config(self) -> TPOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.reference_free import TPOLossConfig

        names = ("beta", "loss_type", "label_smoothing", "tpo_alpha", "tpo_l_gamma")
        return TPOLossConfig(**{name: getattr(self, name) for name in names})
