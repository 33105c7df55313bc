"""Tiny models with random weights, large enough that their log-probs differ from token to token."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models import auto

from trl_fast.modeling.loading import disable_dropout

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
# One of each thing that a head or an attention layer may do differently.
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.5},
}


def tiny_config(family: str, vocab_size: int = 340, **changes: object) -> PretrainedConfig:
    """A configuration of a family of transformers with the sizes above."""
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    values = {**SIZES, **special, "vocab_size": vocab_size, **FAMILIES.get(family, {}), **changes}
    return auto.CONFIG_MAPPING[family](**values)


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model of that configuration, in training mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).float().train()


def tiny_classifier(family: str = "llama", *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A float32 model with a head of one label, in training mode, its dropout off."""
    torch.manual_seed(seed)
    config = tiny_config(family, **{"num_labels": 1, **changes})
    model = AutoModelForSequenceClassification.from_config(config).float().train()
    disable_dropout(model)
    return model


def save_tiny_model(folder: Path, tokenizer: object, family: str = "llama", **changes: object) -> str:
    """Writes a model and a tokenizer that fits it; the folder's name as `from_pretrained` takes it."""
    tiny_model(family, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_classifier(folder: Path, tokenizer: object, family: str = "llama", **changes: object) -> str:
    """Writes a classifier and a tokenizer that fits it; the folder's name as `from_pretrained` takes it."""
    tiny_classifier(family, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
