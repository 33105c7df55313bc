"""Defines GMPOConfig: TRL's arguments and defaults."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from trl_fast.settings.choices import check_choice, one_of

from .grpo_config import GRPOConfig

logger = logging.getLogger(__name__)

# GRPO's, which have no effect here.
_LOSSES = GRPOConfig.__dataclass_fields__["loss_type"].metadata["choices"]
# What GRPO's losses read and GMPO's does not, with the values that it has.
_GIVEN_BY_THE_METHOD = {"loss_type": "gmpo", "importance_sampling_level": "token", "delta": None}


@dataclass
class GMPOConfig(GRPOConfig):
    """Holds the arguments of GMPOTrainer, which are those of GRPO; the loss is GMPO's, and ε are of log-ratios.

    Set first: `output_dir`, `learning_rate`, `num_generations`, `max_completion_length`,
    `per_device_train_batch_size`; `epsilon` and `beta`; `use_vllm` to generate with vLLM.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    loss_type: str = one_of(("gmpo",), default="gmpo")
    """The loss is gmpo; another value has no effect, and a warning says so."""

    epsilon: float = 0.4
    """How far the logarithm of a token's ratio may fall below 0, and rise above it, before it is clipped."""

    epsilon_high: float | None = None
    """How far that logarithm may rise above 0. None: epsilon."""

    use_bias_correction_kl: bool = False
    """Multiply the KL estimate by the ratio; TRL's GMPO does not, whatever is set."""

    def check_values(self) -> None:
        """Checks the arguments that may be changed later, as the base does; the loss stays GMPO's."""
        if self.loss_type not in _LOSSES:
            check_choice(self, "loss_type")
        check_choice(self, "importance_sampling_level")
        for name, value in _GIVEN_BY_THE_METHOD.items():
            if getattr(self, name) != value:
                logger.warning(f"{name}={getattr(self, name)!r} has no effect: GMPO's loss is one formula.")
                setattr(self, name, value)
        super().check_values()
