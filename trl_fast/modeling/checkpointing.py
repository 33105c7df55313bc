"""Switches activation checkpointing, which transformers before 5.20 knows as gradient checkpointing only."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel


def enable_checkpointing(
    model: PreTrainedModel | PeftModel, keywords: dict[str, Any] | None = None, **options: Any
) -> None:
    """Has every layer computed again in backward; options as transformers' method takes them.

    keywords: what torch's checkpoint is given; None means not reentrant.
    """
    _method(model, "enable")(keywords, **options)


def disable_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Has every layer keep its activations."""
    _method(model, "disable")()


def is_checkpointing(model: torch.nn.Module) -> bool:
    """Returns whether any layer is computed again in backward."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _method(model: PreTrainedModel | PeftModel, verb: str) -> Any:
    newer = getattr(model, f"activation_checkpointing_{verb}", None)
    return newer or getattr(model, f"gradient_checkpointing_{verb}")
