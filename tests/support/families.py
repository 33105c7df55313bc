"""Tiny configurations of families whose layers are not all of full attention: what `tiny_model` is to be given."""

from __future__ import annotations

from typing import Any

WINDOW = 6
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_GATED_DELTA = {
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    **{"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    **{"vocab_size_per_layer_input": 340, "hidden_size_per_layer_input": 8},
}

# Recurrent layers and attention, side by side or one after the other.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _GATED_DELTA,
    "qwen3_5_moe_text": {**_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": _GATED_DELTA,
    "kimi_linear": {
        **_LATENT,
        **_LOCAL_EXPERTS,
        **{"q_lora_rank": None, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "bailing_hybrid": {
        **_LATENT,
        **_LOCAL_EXPERTS,
        **{"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "head_dim": 8},
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": {**_CONVOLUTIONS, **_EXPERTS, "num_dense_layers": 1},
    "lfm3": {
        **{"num_hidden_layers": 3, "conv_L_cache": 3, "sliding_window": WINDOW},
        "layer_types": ["conv", "sliding_attention", "full_attention"],
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_MAMBA,
        **{"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 32},
    },
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
        "layers_block_type": ["mamba", "attention"],
    },
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
        **{"mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 1, "num_experts_per_tok": 1},
    },
    "zamba2": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "chunk_size": 8},
        **{"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1},
        **{"num_mem_blocks": 1, "adapter_rank": 4},
    },
}

# Windows shorter than rows, sinks, and keys and values that several layers share.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3_text": _WINDOWED,
    "gemma3n_text": {**_SHARED_KEYS, "laurel_rank": 4, "activation_sparsity_pattern": None},
    "gemma4_text": {**_SHARED_KEYS, "global_head_dim": 16},
    "gpt_oss": {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": _WINDOWED,
    "cohere2": _WINDOWED,
    "ministral": _WINDOWED,
    "exaone4": _WINDOWED,
    "mimo_v2_flash": {"sliding_window": WINDOW},
    "llama4_text": {
        **{"attention_chunk_size": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 1},
        "intermediate_size_mlp": 32,
    },
}
