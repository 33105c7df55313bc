"""Makes models with random weights, for measurements that only depend on shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import CONFIG_MAPPING

from examples.smollm2 import cache_folder, smollm2_folder
from trl_fast.planning.model_shapes import SHAPES

from .picture_rows import save_vision_model

RANDOM_QWEN = "random-qwen2.5-0.5b"
RANDOM_HYBRID = "random-hybrid-100m"
RANDOM_WINDOWED = "random-windowed-100m"
RANDOM_VISION = "random-vision-100m"
RANDOM_NARROW = "random-narrow"

# What the two models of about 100 million weights have in common: the vocabulary is that of their tokenizer.
_SMALL: dict[str, Any] = {
    **{"hidden_size": 640, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    **{"num_attention_heads": 10, "num_key_value_heads": 2, "max_position_embeddings": 8192},
}
# Qwen2.5-0.5B's shape: 494 million weights, of which 136 million are the head's, tied to the embeddings.
QWEN_05B = {
    **{name: value for name, value in SHAPES["qwen2.5-0.5b"].items() if name != "model_type"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
# The types of models and what their configurations say.
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    RANDOM_QWEN: ("qwen2", QWEN_05B),
    # Shaped as Qwen3.5: three layers of Gated DeltaNet, then one of full attention. 99 million weights.
    RANDOM_HYBRID: (
        "qwen3_5_text",
        {
            **_SMALL,
            **{"intermediate_size": 1920, "linear_num_value_heads": 10, "linear_num_key_heads": 10},
            **{"linear_key_head_dim": 64, "linear_value_head_dim": 64},
        },
    ),
    # Shaped as Gemma 3: five layers with a window, then one of full attention. 102 million weights.
    RANDOM_WINDOWED: (
        "gemma3_text",
        {**_SMALL, "intermediate_size": 2560, "sliding_window": 256, "query_pre_attn_scalar": 64},
    ),
    # Qwen2.5-0.5B's 24 layers, so narrow that arithmetic takes next to nothing beside the host's work.
    RANDOM_NARROW: (
        "qwen2",
        {
            **{**QWEN_05B, "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128},
            **{"num_attention_heads": 4, "num_key_value_heads": 2},
        },
    ),
}
RANDOM_MODELS = (*_MODELS, RANDOM_VISION)


def model_folder(name: str | None) -> str:
    """Returns a model's folder: None is SmolLM2-135M-Instruct; one of RANDOM_MODELS is made once and then cached."""
    if name is None:
        return str(smollm2_folder())
    return str(_random_model(name)) if name in RANDOM_MODELS else name


def _random_model(name: str) -> Path:
    folder = cache_folder().parent / name
    if name == RANDOM_VISION:
        if not (folder / "processor_config.json").is_file():
            save_vision_model(folder)
    elif not (folder / "config.json").is_file():
        model_type, values = _MODELS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values))
        model.to(torch.bfloat16).save_pretrained(folder)
        # Any tokenizer does whose tokens the head has rows for.
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
        tokenizer.model_max_length = values["max_position_embeddings"]
        tokenizer.save_pretrained(folder)
    return folder
