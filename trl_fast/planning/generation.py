"""Simulates the memory of sampling completions with transformers' `generate`, as `TransformersEngine` calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import evaluating
from trl_fast.modeling.segment_attention import set_attention
from trl_fast.rollout.prompt_cache import CACHE_ARGUMENT, new_cache, repeat_rows

from .device_batches import pixels_on_device
from .device_facts import PADDED_ATTENTION
from .memory_timeline import GENERATION_STAGE, PROMPTS_STAGE
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class Generation:
    """Describes what is sampled at a time.

    - `prompt_ids`: the prompts that are read, (P, T) int64: different ones, or one for each completion.
    - `completions`: how many there are; `total_tokens`: of each, its prompt included.
    - `images`: the keywords by which the model's forward takes the prompts' images.
    """

    prompt_ids: torch.Tensor
    completions: int
    total_tokens: int
    images: Mapping[str, torch.Tensor]


def simulate_generation(
    setup: TrainingSetup, policy: PreTrainedModel | PeftModel, what: Generation, enter: Callable[[str], None]
) -> None:
    """Runs the passes of sampling that take most memory: the one over the prompts, and that of the last token.

    Prompts are all of one length, so nothing is masked. Keys and values of a prompt are repeated for its completions,
    and images are read with the prompts alone. Logits are of the last position alone, and sampling makes float32
    numbers of them. enter: names both stages.
    """
    inner = base_model(policy)
    config = inner.config.get_text_config(decoder=True)
    before = config._attn_implementation
    set_attention(inner, PADDED_ATTENTION)
    cache = new_cache(policy)
    try:
        with evaluating(policy), setup.autocast():
            enter(PROMPTS_STAGE)
            _sample(policy, cache, what.prompt_ids, **pixels_on_device(what.images))
            enter(GENERATION_STAGE)
            prompts = len(what.prompt_ids)
            if what.completions > prompts:
                rows = torch.arange(prompts).repeat_interleave(-(-what.completions // prompts))
                repeat_rows(policy, cache, rows[: what.completions])
            for layer in cache.layers:
                grow(layer, what.total_tokens - 1)
            _sample(policy, cache, torch.zeros(what.completions, 1, dtype=torch.int64))
    finally:
        set_attention(inner, before)


def _sample(policy: torch.nn.Module, cache: DynamicCache, ids: torch.Tensor, **images: torch.Tensor) -> None:
    """Runs the model on further tokens `ids` (B, T) of each row, with their images, and draws the next ones."""
    logits = policy(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}, **images).logits
    scores = logits[:, -1].to(torch.float32, copy=True)
    torch.multinomial(scores.softmax(-1), num_samples=1)


def grow(layer: CacheLayerMixin, tokens: int) -> None:
    """Gives a layer keys and values of so many tokens, or of those in its window; states of others do not grow."""
    if getattr(layer, "keys", None) is None:
        return
    window = getattr(layer, "sliding_window", None)
    tokens = tokens if window is None else min(tokens, window - 1)
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        setattr(layer, name, None)
        setattr(layer, name, tensor.new_empty(*tensor.shape[:2], tokens, tensor.shape[-1]))
