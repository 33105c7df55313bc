"""Walks all families of causal language models of transformers, tiny and random: which layout runs, and is it exact.

`python -m benchmarks.families` prints a line a family; with names, those families alone. `auto` is asked for a layout;
loss and every gradient of rows in it are then compared with those of padded rows, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import random
import warnings
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trl_fast.data import Tree, pack_trees
from trl_fast.modeling.layer_kinds import LayerKind, layer_kinds
from trl_fast.modeling.layouts import LayoutRequest, choose_layout
from trl_fast.modeling.loading import disable_dropout
from trl_fast.modeling.scoring import attach_scoring, score
from trl_fast.settings.batch_layouts import PADDED

VOCABULARY = 340
# More weights than that are a sign that a family's sizes have names that are not in SIZES.
LARGEST = 20_000_000
# What every family gets if its own configuration has the name, so that windows are crossed and experts are few.
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2},
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 6},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "topk_group": 1},
    **{"moe_num_experts": 4, "moe_k": 2, "moe_topk": 2, "n_group": 1, "first_k_dense_replace": 1},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 4},
    **{"mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "num_heads": 4, "chunk_size": 8},
    **{"attention_window_size": 6, "attention_chunk_size": 6, "decoder_layers": 2, "decoder_attention_heads": 4},
    **{"d_model": 32, "decoder_ffn_dim": 64, "encoder_layers": 1, "is_decoder": True},
}


class Outcome(NamedTuple):
    """Holds what came of a family.

    - `layout`: the one that `auto` takes, or "none" where the model could not be built or run.
    - `reason`: why it is not the best one.
    - `error`: the largest difference of a gradient from that of padded rows, as a share; None where rows are padded.
    - `kinds`: the layers.
    """

    family: str
    layout: str
    reason: str = ""
    error: float | None = None
    kinds: tuple[LayerKind, ...] = ()


_TYPES = ["sliding_attention", "full_attention"]
_STATES = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_DELTA_ATTENTION = {**_STATES, **_LATENT, "q_lora_rank": None, "first_k_dense_replace": 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_MAMBA = {"mamba_d_state": 8, "layers_block_type": ["mamba", "hybrid"]}
_PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
_GEMMA4 = {
    **{**_PER_LAYER, "num_hidden_layers": 4, "layer_types": _TYPES * 2, "global_head_dim": 16, "head_dim": 8},
    **{"num_kv_shared_layers": 2, "num_global_key_value_heads": 1, "initializer_range": 0.1},
    # A norm follows: of 8 channels, those of a token may all be near 0, and their rounding is then what is compared.
    "hidden_size_per_layer_input": 32,
}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4}
# What a family needs besides, above all layers of each of its kinds; `...` leaves a size out.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "longcat_flash", "youtu"), _LATENT),
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "granitemoehybrid"), _STATES),
    **dict.fromkeys(("lfm2", "lfm3"), _CONVOLUTION),
    **dict.fromkeys(("afmoe", "beam", "cohere2", "cohere2_moe", "cwm", "dots1", "exaone4"), {"layer_types": _TYPES}),
    **dict.fromkeys(("exaone_moe", "flint", "gemma2", "gemma3_text", "gpt_oss"), {"layer_types": _TYPES}),
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "laguna", "mellum", "ministral"), {"layer_types": _TYPES}),
    **dict.fromkeys(("mimo_v2_flash", "olmo3", "vaultgemma"), {"layer_types": _TYPES}),
    **dict.fromkeys(("qwen2", "qwen3"), {"layer_types": _TYPES, "use_sliding_window": True}),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), {"use_sliding_window": True, "max_window_layers": 1}),
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 4}),
    "bailing_hybrid": _DELTA_ATTENTION,
    "bamba": {"attn_layer_indices": [1], "attn_rotary_emb": 4},
    "cohere_compass_text": {"layer_types": _TYPES, "rope_parameters": dict.fromkeys(_TYPES, _ROTARY)},
    "electra": {"embedding_size": 32},
    "falcon": {"head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **{**_PER_LAYER, "num_hidden_layers": 5, "layer_types": [*_TYPES, *_TYPES, _TYPES[0]], "laurel_rank": 4},
        **{"num_kv_shared_layers": 2, "intermediate_size": [64] * 5, "altup_num_inputs": 3},
        **{"activation_sparsity_pattern": [0.9, 0.0, 0.5, 0.0, 0.0]},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "jamba": {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_DELTA_ATTENTION, "num_experts_per_token": 2, "linear_num_heads": 2, "linear_head_dim": 8},
    "kolibri1": {"layer_types": _TYPES},
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "modernbert-decoder": {"layer_types": _TYPES},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "rembert": {"output_embedding_size": 32, "input_embedding_size": 32},
    "smollm3": {"layer_types": _TYPES, "use_sliding_window": True, "no_rope_layers": [1, 0]},
    "xlstm": {"v_head_dim": ..., "qk_head_dim": ...},
    "zamba": {**_MAMBA, "n_mamba_heads": 2, "tie_word_embeddings": False},
    "zamba2": {
        **{**_MAMBA, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "num_mem_blocks": 1},
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str) -> PretrainedConfig:
    """Returns a small configuration of a family, with short windows and layers of each of its kinds.

    Raises:
        ValueError: it is a family of models that read images or sounds too.
    """
    default = CONFIG_MAPPING[family]()
    if default.get_text_config() is not default:
        raise ValueError(f"{family} reads more than text; its text model is a family of its own")
    changes = {**{name: value for name, value in SIZES.items() if _has(default, name)}, **CHANGES.get(family, {})}
    return CONFIG_MAPPING[family](**{name: value for name, value in changes.items() if value is not ...})


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:
        # transformers' word for a number that differs from layer to layer.
        return True


def tiny_model(family: str) -> PreTrainedModel:
    """Returns a random float32 model of a family, in training mode, its dropout off."""
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{family} has {size:,} weights: its sizes have other names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().train()
    attach_scoring(model)
    disable_dropout(model)
    return model


def random_trees() -> list[Tree]:
    """Returns trees with branches in front of a window's edge and behind it, and a prompt that is not shared."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    shapes = [(18, (3, 9)), (21, (6, 1, 4)), (17, (4,)), (2, (4, 7))]
    return [Tree(tokens(prompt), [tokens(branch) for branch in branches]) for prompt, branches in shapes]


def loss_gradients(model: PreTrainedModel, layout: str) -> dict[str, torch.Tensor]:
    """Returns the gradient of every parameter, of a weighted sum of the scores of the random trees."""
    scores = score(model, pack_trees(random_trees(), layout, 2)).tokens.logprobs
    model.zero_grad()
    (scores * torch.linspace(0.5, 1.5, len(scores))).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def gradient_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of a gradient from the expected one, as a share of it or of 1e-3 of all."""
    if got.keys() != expected.keys():
        raise ValueError(f"other parameters have a gradient: {sorted(got.keys() ^ expected.keys())}")
    least = 1e-3 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = [(got[name] - gradient).norm() / max(gradient.norm(), least) for name, gradient in expected.items()]
    return torch.stack(errors).max().item()


def try_family(family: str) -> Outcome:
    """Returns what comes of a family: it is built, asked for a layout, and compared with padded rows."""
    try:
        model, padded = tiny_model(family), tiny_model(family)
        kinds = layer_kinds(model)
        sequences = [tree.prompt_ids for tree in random_trees()]
        layout, reason = choose_layout(model, LayoutRequest("auto", max_length=256), sequences)
        choose_layout(padded, LayoutRequest(PADDED), sequences)
        expected = loss_gradients(padded, PADDED)
        error = None if layout == PADDED else gradient_error(loss_gradients(model, layout), expected)
        return Outcome(family, layout, reason or "", error, kinds)
    except Exception as failure:
        return Outcome(family, "none", f"{type(failure).__name__}: {failure}".replace("\n", " ")[:200])


def main() -> None:
    """Prints a line for each family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl_fast").setLevel(logging.ERROR)
    for family in parser.parse_args().families or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = try_family(family)
        error = "" if found.error is None else f"{found.error:.1e}"
        print(f"{family:24} {found.layout:14} {error:8} {found.reason}", flush=True)


if __name__ == "__main__":
    main()
