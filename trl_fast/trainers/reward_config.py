"""Defines RewardConfig: TRL's arguments and defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from .base.config import BaseConfig


@dataclass
class RewardConfig(BaseConfig):
    """Holds the arguments of RewardTrainer: a model with one output learns which of two completions is better.

    Set first: `output_dir`, `learning_rate`, `max_length`, `per_device_train_batch_size`;
    `center_rewards_coefficient`, which is explained in `trl_fast.losses.reward`.

    Raises:
        ValueError: a value is out of range, or is for models with a vocabulary head.
    """

    unit: ClassVar[str] = "pairs"
    first_metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate", "eval_loss"),
    )

    _FOR_LANGUAGE_MODELS: ClassVar[tuple[str, ...]] = (
        "head_backend",
        "head_workspace_bytes",
        "head_grad",
        "router_aux_loss_coef",
    )

    learning_rate: float = 1e-4
    """Initial learning rate of AdamW."""

    max_length: int | None = 1024
    """Longest prompt + completion in tokens; pairs with a longer one are left out. None: no limit."""

    chat_template_path: str | None = None
    """Chat template to use: a Jinja file, or a tokenizer's hub name or folder. None: the tokenizer's own."""

    eos_token: str | None = None
    """Token that ends a text. None: the tokenizer's own."""

    center_rewards_coefficient: float | None = None
    """Weight of a term that keeps rewards around zero, such as 0.01. None: no such term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {item.name: item.default for item in fields(self)}
        for name in self._FOR_LANGUAGE_MODELS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for language models; a reward model has no head over the "
                    "vocabulary, so leave it out"
                )
