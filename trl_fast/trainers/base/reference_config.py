"""Defines what the configs of all methods with a reference policy share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl_fast.settings.older_names import older_name

from .config import BaseConfig


@dataclass
class ReferenceConfig(BaseConfig):
    """Holds the arguments of a trainer that holds its policy against a reference."""

    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate of AdamW."})
    sync_ref_model: bool = field(default=False, metadata={"help": "TR-DPO: let the reference follow the policy."})
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "The policy's share when it follows."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two such updates."})

    # Names of older TRL versions.
    ref_model_init_kwargs: dict[str, Any] | str | None = older_name("it works for a ref_model given by name.")
    model_adapter_name: str | None = older_name("it works (the adapter is made active).")
    ref_adapter_name: str | None = older_name("it works (the adapter is the reference policy).")

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["ref_model_init_kwargs"]
