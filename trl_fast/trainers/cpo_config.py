"""Defines CPOConfig: TRL's arguments and defaults, and the names that older scripts use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_fast.settings.choices import one_of

from .base.reference_free_config import ReferenceFreeConfig

if TYPE_CHECKING:
    from trl_fast.losses.reference_free import CPOLossConfig

# SimPO with AlphaPO's rewards and no likelihood term.
_ALPHAPO = "alphapo"


@dataclass
class CPOConfig(ReferenceFreeConfig):
    """Holds the arguments of CPOTrainer: learning from pairs of completions, without a reference.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`; `beta`, `loss_type` and
    `cpo_alpha`, which are explained in `trl_fast.losses.reference_free`. SimPO is loss_type='simpo' with cpo_alpha=0.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    beta: float = 0.1
    """How much the margin between chosen and rejected weighs; of ipo, the inverse of the margin that is aimed at."""

    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be flipped: for sigmoid and simpo."""

    loss_type: str = one_of(("sigmoid", "hinge", "ipo", "simpo", _ALPHAPO), default="sigmoid")
    """Loss of a pair: sigmoid, hinge, ipo, simpo or alphapo.

    ipo and simpo read the mean log-probability of a token, the others the sum. alphapo is simpo with cpo_alpha=0.
    """

    cpo_alpha: float = 1.0
    """Weight of the likelihood of chosen completions. 0: none."""

    simpo_gamma: float = 0.5
    """The margin that loss_type='simpo' aims at."""

    alpha: float = 0.0
    """AlphaPO: shape of the reward (1 - p ** -alpha) / alpha of a completion's probability p. 0: log p."""

    def __post_init__(self) -> None:
        if self.loss_type == "kto_pair":
            raise ValueError("loss_type='kto_pair': CPO has not had it since TRL 0.9; use KTOTrainer")
        if self.loss_type == _ALPHAPO:
            self.loss_type, self.cpo_alpha = "simpo", 0.0
        super().__post_init__()

    def loss_config(self) -> CPOLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        from trl_fast.losses.reference_free import CPOLossConfig

        names = ("beta", "loss_type", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha")
        return CPOLossConfig(**{name: getattr(self, name) for name in names})
