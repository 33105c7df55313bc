"""Makes models with random weights, for measurements that only depend on shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from examples.smollm2 import cache_folder, smollm2_folder
from trl_fast.planning.model_shapes import SHAPES

RANDOM_QWEN = "random-qwen2.5-0.5b"
# Qwen2.5-0.5B's shape: 494 million weights, of which 136 million are the head's, tied to the embeddings.
QWEN_05B = {
    **{name: value for name, value in SHAPES["qwen2.5-0.5b"].items() if name != "model_type"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def model_folder(name: str | None) -> str:
    """Returns a model's folder: None is SmolLM2-135M-Instruct, RANDOM_QWEN is made once and kept in the cache."""
    if name is None:
        return str(smollm2_folder())
    return str(_random_qwen()) if name == RANDOM_QWEN else name


def _random_qwen() -> Path:
    folder = cache_folder().parent / RANDOM_QWEN
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        Qwen2ForCausalLM(Qwen2Config(**QWEN_05B)).to(torch.bfloat16).save_pretrained(folder)
        # Any tokenizer does whose tokens the head has rows for.
        tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
        tokenizer.model_max_length = QWEN_05B["max_position_embeddings"]
        tokenizer.save_pretrained(folder)
    return folder
