"""Defines what the configs of all methods with a reference policy share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_fast.settings.older_names import older_name

from .config import BaseConfig


@dataclass
class ReferenceConfig(BaseConfig):
    """Holds the arguments of a trainer that holds its policy against a reference."""

    learning_rate: float = 1e-6
    """Initial learning rate of AdamW."""

    sync_ref_model: bool = False
    """TR-DPO: let the reference follow the policy, every ref_model_sync_steps steps (arXiv 2404.09656)."""

    ref_model_mixup_alpha: float = 0.6
    """The policy's share when the reference follows: ref = alpha * policy + (1 - alpha) * ref."""

    ref_model_sync_steps: int = 512
    """Update steps between two times that the reference follows."""

    # Names of older TRL versions.
    ref_model_init_kwargs: dict[str, Any] | str | None = older_name("it works for a ref_model given by name.")
    model_adapter_name: str | None = older_name("it works (the adapter is made active).")
    ref_adapter_name: str | None = older_name("it works (the adapter is the reference policy).")

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["ref_model_init_kwargs"]
