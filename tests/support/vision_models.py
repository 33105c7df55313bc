"""Tiny models of classes that read images too, made from configurations."""

from __future__ import annotations

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models import auto

from support.models import SIZES
from support.vision_processors import TILES, special_ids
from trl_fast.modeling.loading import disable_dropout

_TEXT = {**SIZES, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
_TOWER |= {"image_size": 28, "patch_size": 7}
_QWEN_TOWER = {"depth": 1, "hidden_size": 32, "embed_dim": 32, "num_heads": 4, "patch_size": 14}
_QWEN_TOWER |= {"intermediate_size": 64, "out_hidden_size": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _llama_in(**tower: object) -> dict:
    return {"text_config": {**_TEXT, "model_type": "llama"}, "vision_config": {**_TOWER, **tower}}


def _qwen(tower: dict | None = None, **text: object) -> dict:
    return {
        "text_config": {**_TEXT, "rope_parameters": _ROTARY, **text},
        "vision_config": {**_QWEN_TOWER, **(tower or {})},
    }


CONFIGS = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": _TOWER,
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {
            **{**_TEXT, "initializer_range": 0.1, "sliding_window": 7, "global_head_dim": 16},
            **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 360, "hidden_size_per_layer_input": 8},
        },
        "vision_config": {**_TOWER, "head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2},
    },
    "qwen3_5": _qwen(
        {"num_position_embeddings": 64},
        rope_parameters={**_ROTARY, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
        layer_types=["linear_attention", "full_attention"],
        initializer_range=0.1,
        **{f"linear_num_{each}_heads": 2 for each in ("key", "value")},
        **{f"linear_{each}_head_dim": 8 for each in ("key", "value")},
    ),
    "lfm2_vl": {
        "text_config": {**_TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        "vision_config": {**_TOWER, "model_type": "siglip2_vision_model", "num_patches": 16},
    },
    "qwen2_vl": _qwen(),
    "qwen2_5_vl": _qwen({"fullatt_block_indexes": [0], "window_size": 56}),
    "qwen3_vl": _qwen({"deepstack_visual_indexes": [0], "num_position_embeddings": 64}),
    "qwen3_vl_moe": _qwen({"deepstack_visual_indexes": [0], "num_position_embeddings": 64}, **_EXPERTS),
    "glm4v": _qwen({"out_hidden_size": 32, "image_size": 28}),
    "llava": _llama_in(model_type="clip_vision_model", projection_dim=32, num_hidden_layers=2),
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
        "image_grid_pinpoints": [[28, 28], *TILES],
    },
    "llava_next": {
        **_llama_in(model_type="clip_vision_model", projection_dim=32, num_hidden_layers=2),
        "image_grid_pinpoints": TILES,
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma"},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model"},
        "projection_dim": 32,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TOWER, "model_type": "pixtral"},
    },
    "smolvlm": {**_llama_in(), "scale_factor": 2},
    "idefics3": {**_llama_in(), "scale_factor": 2},
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
    },
}


def tiny_vision_model(family: str, *, seed: int = 0, **text: object) -> PreTrainedModel:
    """A float32 model that reads images too, in training mode, its dropout off; text: changes of its text model.

    Its ids of images are those of `tiny_processor(family)`.
    """
    torch.manual_seed(seed)
    ids = {**special_ids(family)}
    values = {**CONFIGS[family], "tie_word_embeddings": False}
    values["text_config"] = {"vocab_size": ids.pop("vocab_size"), **values["text_config"], **text}
    config = auto.CONFIG_MAPPING[family](**values)
    for name, token in ids.items():
        setattr(config, name, token)
    model = AutoModelForImageTextToText.from_config(config).float().train()
    for name, weight in model.named_parameters():
        if name.endswith("mm_input_projection_weight"):
            torch.nn.init.normal_(weight, std=0.3)  # Gemma 3's starts at zero, and images would not count
    disable_dropout(model)
    return model
