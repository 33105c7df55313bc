"""Defines what the configs of ORPO, CPO and TPO share: preference data, and no reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trl_fast.settings.choices import TRUNCATION_MODES, check_choice, one_of
from trl_fast.settings.older_names import older_name

from .config import BaseConfig

if TYPE_CHECKING:
    from trl_fast.losses.reference_free import ReferenceFreeLossConfig

logger = logging.getLogger(__name__)


@dataclass
class ReferenceFreeConfig(BaseConfig):
    """Holds the arguments of a trainer on preference data whose loss reads the policy alone.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    unit: ClassVar[str] = "pairs"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "nll_loss"),
        *("grad_norm", "learning_rate", "eval_loss"),
    )

    learning_rate: float = 1e-6
    """Initial learning rate of AdamW."""

    beta: float = 0.1
    """How much the preference weighs."""

    truncation_mode: str = one_of(TRUNCATION_MODES, default="keep_start")
    """Which end of a sequence longer than max_length stays: keep_start or keep_end."""

    max_completion_length: int | None = None
    """Longest completion in tokens; longer ones lose their end. None: no limit but max_length."""

    generate_during_eval: bool = False
    """It has no effect: evaluation does not generate; add a LogCompletionsCallback."""

    is_encoder_decoder: bool | None = None
    """Whether the model is an encoder-decoder; only False works. None: False."""

    # Names of older TRL versions.
    max_prompt_length: int | None = older_name(
        "it works (longer prompts lose their beginning); max_length alone is the present way."
    )
    padding_value: int | None = older_name("padding is masked by length, so it has no effect.")
    label_pad_token_id: int | None = older_name("completions are found by length, so it has no effect.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "truncation_mode", TRUNCATION_MODES)
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder=True: encoder-decoder models are not supported, only causal ones")
        if self.generate_during_eval:
            logger.warning(
                "generate_during_eval=True has no effect: evaluation does not generate; add a LogCompletionsCallback."
            )
        self.loss_config()

    def loss_config(self) -> ReferenceFreeLossConfig:
        """Returns the part of the arguments that the loss reads.

        Raises:
            ValueError: a loss argument is out of range.
        """
        raise NotImplementedError
