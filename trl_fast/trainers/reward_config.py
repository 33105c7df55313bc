"""Defines RewardConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from .base.config import BaseConfig


@dataclass
class RewardConfig(BaseConfig):
    """Holds the arguments of RewardTrainer. `center_rewards_coefficient` is explained in `trl_fast.losses.reward`.

    Raises:
        ValueError: a value is out of range, or is for models with a vocabulary head.
    """

    _FOR_LANGUAGE_MODELS: ClassVar[tuple[str, ...]] = (
        "head_backend",
        "head_workspace_bytes",
        "head_grad",
        "router_aux_loss_coef",
    )

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Rows whose prompt + chosen or prompt + rejected has more tokens are left out; nothing is cut. "
            "None: no limit."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "A Jinja file, or a tokenizer by hub name or folder, whose chat template is used."},
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "The token that ends a text; unset: the tokenizer's own."}
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of a term that keeps rewards around zero, such as 0.01."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {item.name: item.default for item in fields(self)}
        for name in self._FOR_LANGUAGE_MODELS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for language models; a reward model has no head over the "
                    "vocabulary, so leave it out"
                )
