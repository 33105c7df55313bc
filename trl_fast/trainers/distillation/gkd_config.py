"""Defines GKDConfig: the arguments and defaults of TRL's GKDTrainer."""

from __future__ import annotations

from dataclasses import dataclass

from trl_fast.settings.ranges import RANGES

from ..sft_config import SFTConfig
from .config import DistillationConfig


@dataclass
class GKDConfig(DistillationConfig, SFTConfig):
    """Holds the arguments of GKDTrainer: distillation on a mixture of given completions and the student's own.

    Set first: `output_dir`, `teacher_model_name_or_path`, `learning_rate`, `max_length`, `max_new_tokens`, `lmbda`,
    `beta`. Of SFTConfig's arguments, those that change how rows become tokens have no effect, as in TRL.

    Raises:
        ValueError: a value is out of range or does not go with another; the message names both.
    """

    learning_rate: float = 2e-5
    """Initial learning rate of AdamW."""

    disable_dropout: bool = True
    """Switch dropout off in the model and the teacher."""

    shuffle_dataset: bool | None = True  # type: ignore[assignment]  # as DistillationConfig has it
    """Shuffle the training rows."""

    max_length: int | None = 1024
    """Longest prompt + given completion in tokens; longer ones lose the beginning of their prompt. None: no limit."""

    temperature: float = 0.9
    """Divides the logits in sampling; the loss compares the models' own distributions."""

    lmbda: float = 0.5
    """Share of micro-batches whose completions the student samples; the others learn given ones."""

    beta: float = 0.5
    """Which divergence: 0 is forward KL, 1 reverse KL, between them lies the generalised Jensen-Shannon one."""

    max_new_tokens: int = 128
    """Tokens after which a sampled completion is cut off."""

    max_completion_length: int | None = None
    """Has no effect: max_new_tokens stands in its place."""

    packing: bool = False
    """Has no effect: rows are not padded, and none is joined with another."""

    completion_only_loss: bool | None = None
    """Has no effect: completions are learned, and no prompts."""

    assistant_only_loss: bool = False
    """Has no effect: of a conversation the last answer is learned."""

    _VALID_DICT_FIELDS = [
        *DistillationConfig._VALID_DICT_FIELDS,
        *(name for name in SFTConfig._VALID_DICT_FIELDS if name not in DistillationConfig._VALID_DICT_FIELDS),
    ]

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("max_completion_length", "max_new_tokens")}
        # One that is out of range is named by the base, as it was given.
        if all(value is None or value in RANGES[name] for name, value in lengths.items()):
            if self.max_completion_length not in (None, self.max_new_tokens):
                raise ValueError(
                    f"max_completion_length={self.max_completion_length}: GKDConfig has max_new_tokens="
                    f"{self.max_new_tokens} in its place; set that one"
                )
            self.max_completion_length = self.max_new_tokens
        super().__post_init__()

    @property
    def loss_temperature(self) -> float:
        """Returns 1: the loss compares the models' own distributions."""
        return 1.0

    @property
    def evaluates_given(self) -> bool:
        """Says that evaluation is on the dataset's completions."""
        return True
