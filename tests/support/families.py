"""Tiny configurations of model families: each kind of layer, each thing that a family does differently."""

from __future__ import annotations

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "kv_lora_rank": 8, "q_lora_rank": 8},
    "num_key_value_heads": 4,
}
# Scores are small in models this small: a low cap shows.
CAPPED = {"attn_logit_softcapping": 0.5}
TURNS = {"layer_types": ["sliding_attention", "full_attention"]}
# Shorter than all prompts that are shared, and than some branches.
WINDOW = {"sliding_window": 5}
SLIDING = {**WINDOW, **TURNS}
SWITCHED_ON = {**SLIDING, "use_sliding_window": True}

FULL = {
    "llama": {},
    "llama, one key head": {"num_key_value_heads": 1},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, rope scaled": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma": {},
    "gemma2, full": {"sliding_window": 64, **CAPPED},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.3, "embedding_multiplier": 3.0},
    "cohere": {"use_qk_norm": True},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_bigcode": {},
    "starcoder2": {},
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3},
}
OF_EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.5},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "deepseek_v3": {
        **LATENT,
        **{"head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
        **{"first_k_dense_replace": 1, "moe_intermediate_size": 16},
    },
}
WINDOWED = {
    "mistral, window": WINDOW,
    "mistral, window longer than rows": {"sliding_window": 64},
    "mistral, window of two tokens": {"sliding_window": 2},
    "ministral": SLIDING,
    "ministral3": WINDOW,
    "phi3, window": WINDOW,
    "qwen2, window": SWITCHED_ON,
    "smollm3, window": {**SWITCHED_ON, "no_rope_layers": [1, 0]},
    "gemma2": {**SLIDING, **CAPPED},
    "gemma2, no cap": {**SLIDING, "attn_logit_softcapping": None},
    "gemma3_text": SLIDING,
    "vaultgemma": {**SLIDING, **CAPPED},
    "olmo3": SLIDING,
    "cohere2": {**SLIDING, "logit_scale": 1.0},
    "exaone4": SLIDING,
    "kolibri1": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cwm": SLIDING,
    "modernbert-decoder": {**TURNS, "local_attention": 10},
}
WITH_SINKS = {
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mimo_v2_flash": {**SLIDING, "n_routed_experts": 4, "num_experts_per_tok": 2, "v_head_dim": 6},
    "granite_swa": SLIDING,
    "granitemoe_swa": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
}
_STATES = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA_NET = {
    **_STATES,
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_KIMI_DELTA = {
    **{**_STATES, **LATENT, "q_lora_rank": None, "num_experts": 4, "moe_intermediate_size": 16},
    "first_k_dense_replace": 2,
}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_MAMBA2 = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "mamba_chunk_size": 16,
}
_ZAMBA = {"mamba_d_state": 8, "layers_block_type": ["mamba", "hybrid"]}
WITH_STATES = {
    "qwen3_next": {**_DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": {**_DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": _DELTA_NET,
    "kimi_linear": {**_KIMI_DELTA, "num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 8},
    "bailing_hybrid": {**_KIMI_DELTA, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": {**_CONVOLUTION, **EXPERTS, "num_dense_layers": 1},
    "lfm3": _CONVOLUTION,
    "bamba": {**_MAMBA2, "attn_layer_indices": [1], "attn_rotary_emb": 4},
    "granitemoehybrid": {
        **{**_MAMBA2, **_STATES, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    },
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16},
        **{"ssm_state_size": 8, "n_groups": 2, "chunk_size": 16},
    },
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "zamba2": {
        **{**_ZAMBA, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "chunk_size": 16},
        **{"num_mem_blocks": 1, "adapter_rank": 4},
    },
    "zamba": {**_ZAMBA, "n_mamba_heads": 2, "tie_word_embeddings": False},
    "jamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, **EXPERTS},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
}
_PER_LAYER = {"vocab_size_per_layer_input": 340, "hidden_size_per_layer_input": 8, "initializer_range": 0.1, **WINDOW}
WITH_SHARED_KEYS = {
    "gemma3n_text": {
        **{**_PER_LAYER, "num_hidden_layers": 5, "layer_types": [*TURNS["layer_types"] * 2, "sliding_attention"]},
        **{"num_kv_shared_layers": 2, "intermediate_size": [64] * 5, "laurel_rank": 4, "altup_num_inputs": 3},
        **{"activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.0]},
    },
    "gemma4_text": {
        **{**_PER_LAYER, "num_hidden_layers": 4, "layer_types": TURNS["layer_types"] * 2, "global_head_dim": 16},
        **{"num_kv_shared_layers": 2, "num_global_key_value_heads": 1},
        # A layer's inputs are gated and normed: of 8 channels, those of a token may all be near 0, which makes as much
        # of their rounding as an ulp in each weight does: more than the tests of gradients allow.
        "hidden_size_per_layer_input": 32,
    },
}
FAMILIES = {**FULL, **OF_EXPERTS, **WINDOWED, **WITH_SINKS, **WITH_STATES, **WITH_SHARED_KEYS}
# Whose layers are like those of another family above: slow tests.
LIKE_OTHERS = {
    *(
        "mistral, window longer than rows",
        "ministral",
        "ministral3",
        "phi3, window",
        "smollm3, window",
        "olmo3",
        "cwm",
    ),
    *(
        "kolibri1",
        "gemma2, no cap",
        "vaultgemma",
        "granitemoe_swa",
        "qwen3_5_moe_text",
        "qwen3_next",
        "lfm2_moe",
        "bailing_hybrid",
    ),
    *("bamba", "granitemoehybrid", "zamba", "mamba2"),
}
