"""Reads the sizes of decoder layers from a transformers configuration, under the names that the families use."""

from __future__ import annotations

from typing import Any

# DeepSeek and GLM-4 say n_routed_experts, ERNIE 4.5 moe_num_experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Gemma 4 says top_k_experts, Hunyuan moe_topk, ERNIE 4.5 moe_k.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


def mlp_width(config: Any) -> int | None:
    """Returns the channels between the products of an MLP: the most, where layers differ (Gemma 3n); None: not told.

    config: the configuration of the text model, here and below.
    """
    return _most(config, ("intermediate_size",))


def head_width(config: Any) -> int | None:
    """Returns the channels of an attention head: the most, where layers differ (Gemma 4); None: not told."""
    return _most(config, ("head_dim",))


def key_value_heads(config: Any) -> int | None:
    """Returns the heads of keys and values: the most, where layers differ; None: not told."""
    return _most(config, ("num_key_value_heads",))


def num_experts(config: Any) -> int | None:
    """Returns the experts of a layer, None of a model without."""
    return _most(config, _EXPERTS)


def experts_per_token(config: Any) -> int | None:
    """Returns the experts that a token is sent to in a layer, None of a model without."""
    return _most(config, _EXPERTS_PER_TOKEN)


def _most(config: Any, names: tuple[str, ...]) -> int | None:
    """Returns the first of these numbers that is there; of a list with one a layer the largest."""
    found = next((value for name in names if (value := _value(config, name))), None)
    return max(found) if isinstance(found, list | tuple) else found


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:
        # transformers' word for a number that differs from layer to layer.
        layers = (config.per_layer_config[number] for number in range(config.num_hidden_layers))
        return [getattr(layer, name) for layer in layers]
