"""Computes what a model keeps of each different prompt once, and repeats it for all completions of the prompt.

What is kept lies in the layers of transformers' `DynamicCache`: keys and values of attention, of which a window keeps
the last ones, and the convolution's inputs and the state of recurrent layers (Gated DeltaNet, Mamba, short
convolutions). All have a row a sequence. Prompts of different lengths are padded on the left, as in any batch that is
generated: pads have no effect on what is kept at the right end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.generation.utils import ALL_CACHE_NAMES

from trl_fast.modeling.loading import base_model

# What models and `generate` call the cache.
CACHE_ARGUMENT: str = ALL_CACHE_NAMES[0]

# Kinds of layers whose cache `Cache.reorder_cache` picks rows of. Releases of transformers differ in which they have.
_KINDS = (
    *("full_attention", "sliding_attention", "chunked_attention", "indexed_attention"),
    *("conv", "linear_attention", "hybrid", "hybrid_sliding", "dummy"),
)
_REPEATABLE = {DYNAMIC_LAYER_TYPE_MAPPING.get(kind) for kind in _KINDS}

# Model types whose layers keep states in themselves, beside the cache.
_KEEP_STATES_THEMSELVES = {"recurrent_gemma"}

Model = PreTrainedModel | PeftModel


def why_prompts_are_not_shared(model: Model, config: GenerationConfig) -> str | None:
    """Returns why a prompt is to be computed for each of its completions; None if once will do.

    config: the settings of the generation.
    """
    return _reason_in_settings(model, config) or _reason_in_model(model)


def _reason_in_settings(model: Model, config: GenerationConfig) -> str | None:
    # `generate` takes either the name of a cache or a cache.
    named = config.cache_implementation or model.generation_config.cache_implementation
    if named is not None:
        return f"cache_implementation={named!r} has `generate` make its own cache"
    if not config.use_cache:
        return "use_cache=False keeps nothing of a prompt"
    if config.prefill_chunk_size is not None:
        return f"prefill_chunk_size={config.prefill_chunk_size} has `generate` read prompts in chunks"
    if (config.num_beams or 1) > 1:
        return f"num_beams={config.num_beams}: each beam needs a cache of its own"
    return None


def _reason_in_model(model: Model) -> str | None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type.value} puts virtual tokens in front of prompts"
    inner: Any = base_model(model)
    name = type(inner).__name__
    if inner.config.is_encoder_decoder:
        return f"{name} reads prompts by an encoder"
    if inner.config.model_type in _KEEP_STATES_THEMSELVES:
        return f"layers of {name} keep states themselves, beside the cache"
    takes_cache = CACHE_ARGUMENT in inspect.signature(inner.forward).parameters
    if not takes_cache or not inner._supports_default_dynamic_cache():
        return f"{name} has a cache of its own kind, which `generate` does not take filled"
    unknown = {type(layer).__name__ for layer in new_cache(model).layers if type(layer) not in _REPEATABLE}
    if unknown:
        return f"{name} has caches whose rows cannot be repeated: {', '.join(sorted(unknown))}"
    return None


def new_cache(model: Model) -> DynamicCache:
    """Returns an empty cache with the layers that a model needs."""
    return DynamicCache(config=base_model(model).config.get_text_config(decoder=True))


def prompt_cache(
    model: Model,
    prompts: Sequence[Hashable],
    pad_token_id: int,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_keywords_of: Callable[[list[int], torch.Tensor], dict[str, torch.Tensor]],
    **how: Any,
) -> DynamicCache:
    """Returns a cache of each prompt but its last token, whose logits count; each different prompt is computed once.

    Random states stay.

    Args:
        model: a model that shares prompts, see `why_prompts_are_not_shared`.
        prompts: what tells them apart: their tokens, two or more, and their images.
        pad_token_id: what the prompts are padded with.
        input_ids, attention_mask: the prompts padded on the left, (B, longest prompt) int64.
        image_keywords_of: from the numbers of prompts and their `input_ids` to the keywords by which the model's
            forward takes their images.
        how: further arguments of `generate`.
    """
    different = list(dict.fromkeys(prompts))
    rows = [prompts.index(prompt) for prompt in different]
    cache = new_cache(model)
    # One token that nobody reads: so the model gets its prompts in exactly the way that `generate` gives them.
    config = GenerationConfig(
        max_new_tokens=1, do_sample=True, pad_token_id=pad_token_id, use_cache=True, disable_compile=True
    )
    beginnings = input_ids[rows, :-1]
    with torch.random.fork_rng([input_ids.device] if input_ids.is_cuda else []):
        cast("Any", model).generate(
            input_ids=beginnings,
            attention_mask=attention_mask[rows, :-1],
            generation_config=config,
            **{CACHE_ARGUMENT: cache},
            **image_keywords_of(rows, beginnings),
            **how,
        )
    place = {prompt: index for index, prompt in enumerate(different)}
    repeat_rows(model, cache, torch.tensor([place[prompt] for prompt in prompts], device=input_ids.device))
    return cache


def repeat_rows(model: Model, cache: DynamicCache, rows: torch.Tensor) -> None:
    """Gives a cache the rows of a batch that are listed, in their order; rows: int64 (new batch size,)."""
    cache.reorder_cache(cast("Any", rows))
    # Models of images whose positions have three axes keep beside the cache how far each row's text is moved.
    for module in base_model(model).modules():
        moved = getattr(module, "rope_deltas", None)
        if isinstance(moved, torch.Tensor):
            module.rope_deltas = moved[rows]
