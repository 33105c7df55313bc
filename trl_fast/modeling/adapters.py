"""Tells what an adapter of peft needs of a batch, rows of one sequence or room for virtual tokens, and its dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel, PeftType
from transformers import PreTrainedModel

# They put keys and values into the cache, which gradient checkpointing throws away.
_PREPENDS_KEYS = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)


def adapter_refusal(model: PreTrainedModel | PeftModel) -> str | None:
    """Returns why a model's adapters cannot run rows of several sequences; None if they can, or there are none."""
    for config in _configs_of(model):
        name = type(config).__name__
        if config.is_prompt_learning:
            return f"{name} prepends virtual tokens to each row"
        if getattr(config, "alora_invocation_tokens", None):
            return f"{name} with alora_invocation_tokens starts behind the last invocation in each row"
        if config.peft_type == PeftType.XLORA:
            return f"{name} weighs its adapters by a pass over each row"
    return None


def has_virtual_tokens(model: PreTrainedModel | PeftModel) -> bool:
    """Returns whether an adapter prepends virtual tokens: prompt tuning, prefix tuning, p-tuning and their kin."""
    return any(config.is_prompt_learning for config in _configs_of(model))


def check_virtual_tokens(model: PreTrainedModel | PeftModel, *, gradient_checkpointing: bool) -> None:
    """Checks that what an adapter prepends reaches every layer.

    Raises:
        ValueError: an adapter prepends keys and values, and gradient checkpointing would drop them silently.
    """
    for config in _configs_of(model):
        if gradient_checkpointing and config.peft_type in _PREPENDS_KEYS:
            raise ValueError(
                f"gradient_checkpointing=True drops the keys and values that {type(config).__name__} prepends, so "
                "that nothing would be learned; set gradient_checkpointing=False"
            )


def check_reads_last_token(model: PreTrainedModel | PeftModel) -> None:
    """Checks that a classifier finds each sequence's last token, which it reads.

    Raises:
        ValueError: an adapter prepends virtual tokens, in the place of which transformers looks for it in vain.
    """
    if has_virtual_tokens(model):
        raise ValueError(
            f"{type(model.active_peft_config).__name__} prepends virtual tokens, with which transformers' classifiers "
            "read a padded row's last token in the place of the sequence's; use LoRA"
        )


def adapter_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Returns the dtypes of what trains of a model with an adapter, by name; of other models nothing."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}


def set_dtypes(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Gives the parameters of these names these dtypes; those that have them, or are not there, stay as they are."""
    for name, weight in model.named_parameters():
        wanted = dtypes.get(name, weight.dtype)
        if weight.dtype != wanted:
            weight.data = weight.data.to(wanted)


def _configs_of(model: PreTrainedModel | PeftModel) -> list[PeftConfig]:
    return list(model.peft_config.values()) if isinstance(model, PeftModel) else []
