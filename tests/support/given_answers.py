"""Rows with answers, and teachers that say other things than a student."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from support.tokenizer import build_tokenizer


def conversations(count=16):
    """Questions with answers of different lengths."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"What color is {i}?"},
                    {"role": "assistant", "content": f"It is blue {i * 7}" * (1 + i % 3)},
                ]
            }
            for i in range(count)
        ]
    )


def texts(count=16):
    """Prompts and completions as text."""
    return Dataset.from_list(
        [{"prompt": f"What color is {i}?", "completion": f" It is blue {i * 7}" * (1 + i % 3)} for i in range(count)]
    )


def save_changed(source, folder, tokenizer=None, **changes):
    """Saves a model like the one at `source` with other weights, and a tokenizer; changes: of its config."""
    model = AutoModelForCausalLM.from_pretrained(source)
    if changes:
        config = type(model.config)(**{**model.config.to_dict(), **changes})
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return str(folder)
