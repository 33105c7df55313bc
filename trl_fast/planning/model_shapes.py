"""Knows what a model looks like: shapes that are built in, and those that a name or a folder tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING

from trl_fast.settings.choices import did_you_mean


def _shape(
    model_type: str, hidden: int, mlp: int, layers: int, heads: tuple[int, int, int], vocabulary: int, **more: Any
) -> dict[str, Any]:
    """Returns a shape. heads: query heads, heads of keys and values, and the size of one."""
    sizes = dict(zip(("num_attention_heads", "num_key_value_heads", "head_dim"), heads, strict=True))
    widths = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return {"model_type": model_type, **widths, **sizes, **more}


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LONG: dict[str, Any] = {"max_position_embeddings": 128000}
_LONGER: dict[str, Any] = {"max_position_embeddings": 262144}
_UNTIED: dict[str, Any] = {"tie_word_embeddings": False}


def _with_tower(model_type: str, text: dict[str, Any], **tower: Any) -> dict[str, Any]:
    """Returns the shape of a model that reads images too, from its text model's and its vision tower's sizes."""
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    text = {name: value for name, value in text.items() if name != "model_type"}
    return {"model_type": model_type, "text_config": text, "vision_config": tower, **tied}


_LLAMA_3: dict[str, Any] = {"vocabulary": 128256, "max_position_embeddings": 131072}
_QWEN_3: dict[str, Any] = {"vocabulary": 151936, "max_position_embeddings": 40960}
# Three layers of the gated delta rule, then one of attention, whose output is gated.
_QWEN_35: dict[str, Any] = {"vocabulary": 248320, "max_position_embeddings": 262144}
# Mamba 2, and attention without positions.
_GRANITE_4: dict[str, Any] = {
    **{"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 8192},
    **{"mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"position_embedding_type": "nope"},
    **_TIED,
}
# Positions of three axes, in these shares of a head.
_QWEN_25_VL: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}}
_QWEN_25_TOWER: dict[str, Any] = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
    **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
}
_QWEN_3_VL: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
}
_QWEN_3_TOWER: dict[str, Any] = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
_QWEN_3_SMALL_TOWER: dict[str, Any] = {
    **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]},
    **_QWEN_3_TOWER,
}
_QWEN_25: dict[str, Any] = {"vocabulary": 151936, "max_position_embeddings": 32768}

# As their publishers' config.json files say; a name on the hub or a folder works as well.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape("llama", 576, 1536, 30, (9, 3, 64), 49152, max_position_embeddings=8192, **_TIED),
    "smollm2-360m": _shape("llama", 960, 2560, 32, (15, 5, 64), 49152, max_position_embeddings=8192, **_TIED),
    "smollm2-1.7b": _shape("llama", 2048, 8192, 24, (32, 32, 64), 49152, max_position_embeddings=8192, **_TIED),
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, (14, 2, 64), **_QWEN_25, **_TIED),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, (12, 2, 128), **_QWEN_25, **_TIED),
    "qwen2.5-3b": _shape("qwen2", 2048, 11008, 36, (16, 2, 128), **_QWEN_25, **_TIED),
    "qwen2.5-7b": _shape("qwen2", 3584, 18944, 28, (28, 4, 128), 152064, max_position_embeddings=131072, **_UNTIED),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, (16, 8, 128), **_QWEN_3, **_TIED),
    "qwen3-1.7b": _shape("qwen3", 2048, 6144, 28, (16, 8, 128), **_QWEN_3, **_TIED),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 36, (32, 8, 128), **_QWEN_3, **_TIED),
    "qwen3-8b": _shape("qwen3", 4096, 12288, 36, (32, 8, 128), **_QWEN_3, **_UNTIED),
    "qwen2.5-vl-3b": _with_tower(
        "qwen2_5_vl",
        _shape("qwen2_5_vl_text", 2048, 11008, 36, (16, 2, 128), 151936, **_QWEN_25_VL, **_LONG, **_TIED),
        **_QWEN_25_TOWER,
        out_hidden_size=2048,
    ),
    "qwen2.5-vl-7b": _with_tower(
        "qwen2_5_vl",
        _shape("qwen2_5_vl_text", 3584, 18944, 28, (28, 4, 128), 152064, **_QWEN_25_VL, **_LONG, **_UNTIED),
        **_QWEN_25_TOWER,
        out_hidden_size=3584,
    ),
    "qwen3-vl-2b": _with_tower(
        "qwen3_vl",
        _shape("qwen3_vl_text", 2048, 6144, 28, (16, 8, 128), 151936, **_QWEN_3_VL, **_LONGER, **_TIED),
        **_QWEN_3_SMALL_TOWER,
        out_hidden_size=2048,
    ),
    "qwen3-vl-4b": _with_tower(
        "qwen3_vl",
        _shape("qwen3_vl_text", 2560, 9728, 36, (32, 8, 128), 151936, **_QWEN_3_VL, **_LONGER, **_TIED),
        **_QWEN_3_SMALL_TOWER,
        out_hidden_size=2560,
    ),
    "qwen3-vl-8b": _with_tower(
        "qwen3_vl",
        _shape("qwen3_vl_text", 4096, 12288, 36, (32, 8, 128), 151936, **_QWEN_3_VL, **_LONGER, **_UNTIED),
        **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]},
        **_QWEN_3_TOWER,
        out_hidden_size=4096,
    ),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, (32, 8, 64), **_LLAMA_3, **_TIED),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 28, (24, 8, 128), **_LLAMA_3, **_TIED),
    "llama-3.1-8b": _shape("llama", 4096, 14336, 32, (32, 8, 128), **_LLAMA_3, **_UNTIED),
    "gemma-3-1b": _shape(
        *("gemma3_text", 1152, 6912, 26, (4, 1, 256), 262144),
        max_position_embeddings=32768,
        sliding_window=512,
        **_TIED,
    ),
    "gemma-3-4b": _shape(
        *("gemma3_text", 2560, 10240, 34, (8, 4, 256), 262208),
        max_position_embeddings=131072,
        sliding_window=1024,
        **_TIED,
    ),
    "gemma-4-31b": _shape(
        *("gemma4_text", 5376, 21504, 60, (32, 16, 256), 262144),
        max_position_embeddings=262144,
        sliding_window=1024,
        num_global_key_value_heads=4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        **_TIED,
    ),
    "gemma-2-2b": _shape("gemma2", 2304, 9216, 26, (8, 4, 256), 256000, max_position_embeddings=8192, **_TIED),
    "gemma-2-9b": _shape("gemma2", 3584, 14336, 42, (16, 8, 256), 256000, max_position_embeddings=8192, **_TIED),
    "qwen3.5-2b": _shape("qwen3_5_text", 2048, 6144, 24, (8, 2, 256), linear_num_value_heads=16, **_QWEN_35, **_TIED),
    "qwen3.5-4b": _shape("qwen3_5_text", 2560, 9216, 32, (16, 4, 256), **_QWEN_35, **_TIED),
    "qwen3.5-9b": _shape("qwen3_5_text", 4096, 12288, 32, (16, 4, 256), **_QWEN_35, **_UNTIED),
    "qwen3-next-80b-a3b": _shape(
        *("qwen3_next", 2048, 5120, 48, (16, 2, 256), 151936), max_position_embeddings=262144, **_UNTIED
    ),
    "gpt-oss-20b": _shape(
        *("gpt_oss", 2880, 2880, 24, (64, 8, 64), 201088),
        max_position_embeddings=131072,
        num_local_experts=32,
        **_UNTIED,
    ),
    "olmo-3-7b": _shape("olmo3", 4096, 11008, 32, (32, 32, 128), 100278, max_position_embeddings=65536, **_UNTIED),
    "lfm2-1.2b": _shape(
        *("lfm2", 2048, 12288, 16, (32, 8, 64), 65536),
        max_position_embeddings=128000,
        # Attention among short convolutions.
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
        **_TIED,
    ),
    "nemotron-h-8b": _shape(
        *("nemotron_h", 4096, 21504, 52, (32, 8, 128), 131072),
        max_position_embeddings=8192,
        # Mamba 2, MLP (-) and attention (*).
        hybrid_override_pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        **_UNTIED,
    ),
    "granite-4.0-h-micro": _shape(
        *("granitemoehybrid", 2048, 8192, 40, (32, 8, 64), 100352),
        max_position_embeddings=131072,
        layer_types=["attention" if number in (5, 15, 25, 35) else "mamba" for number in range(40)],
        **_GRANITE_4,
    ),
}


# The image processors of built-in shapes, by their model type, with the settings of their publishers.
IMAGE_PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 12845056},
    "qwen3_vl": {"patch_size": 16, "min_pixels": 256 * 256, "max_pixels": 4096 * 4096},
}


def shape_name(name_or_path: str) -> str | None:
    """Returns the built-in shape of that name, or of the hub model of that name; None: no such one, or a folder.

    Gated models can so be planned without their licence, and all of them without the hub.
    """
    if Path(name_or_path).exists():
        return None
    name = re.sub(
        r"-(instruct|base|it|chat)\b", "", name_or_path.lower().rpartition("/")[2].replace("meta-llama-", "llama-")
    )
    return name if name in SHAPES else None


def model_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Returns the configuration of a built-in shape, a folder or a model on the hub.

    Raises:
        ValueError: there is no such model, or it is no model of decoder layers.
    """
    name = shape_name(name_or_path)
    if name is not None:
        shape = SHAPES[name]
        values = {name: value for name, value in shape.items() if name != "model_type"}
        return CONFIG_MAPPING[shape["model_type"]](**values)
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={name_or_path!r} is no built-in shape ({', '.join(SHAPES)}), no folder with a "
            f"config.json, and cannot be had from the hub{did_you_mean(name_or_path.lower(), SHAPES)}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model_name_or_path={name_or_path!r} ({config.model_type}) is no language model of decoder layers alone"
        )
    return config
