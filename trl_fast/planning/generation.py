"""Simulates the memory of sampling completions with transformers' `generate`, as `TransformersEngine` calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import evaluating
from trl_fast.rollout.prompt_cache import CACHE_ARGUMENT, new_cache, repeat_rows

from .device_facts import PADDED_ATTENTION
from .memory_timeline import GENERATION_STAGE, PROMPTS_STAGE
from .training_setup import TrainingSetup


@dataclass(frozen=True)
class Generation:
    """Describes what is sampled at a time: so many completions of so many different prompts, in tokens each."""

    prompts: int
    completions: int
    prompt_tokens: int
    total_tokens: int


def simulate_generation(
    setup: TrainingSetup, policy: PreTrainedModel | PeftModel, what: Generation, enter: Callable[[str], None]
) -> None:
    """Runs the passes of sampling that take most memory: the one over the prompts, and that of the last token.

    Prompts are all of one length, so nothing is masked. Keys and values of a prompt are computed once and repeated for
    its completions. Logits are of the last position alone, and sampling makes float32 numbers of them. enter: names
    both stages.
    """
    inner = base_model(policy)
    config = inner.config.get_text_config(decoder=True)
    before = config._attn_implementation
    inner.set_attn_implementation(PADDED_ATTENTION)
    cache = new_cache(policy)
    try:
        with evaluating(policy), setup.autocast():
            enter(PROMPTS_STAGE)
            _sample(policy, cache, what.prompts, what.prompt_tokens)
            enter(GENERATION_STAGE)
            if what.completions > what.prompts:
                rows = torch.arange(what.prompts).repeat_interleave(-(-what.completions // what.prompts))
                repeat_rows(policy, cache, rows[: what.completions])
            for layer in cache.layers:
                grow(layer, what.total_tokens - 1)
            _sample(policy, cache, what.completions, 1)
    finally:
        inner.set_attn_implementation(before)


def _sample(policy: torch.nn.Module, cache: DynamicCache, rows: int, tokens: int) -> None:
    """Runs the model on `tokens` further tokens of each row, and draws the next ones."""
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    logits = policy(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits
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
