"""Generates completions by transformers' `generate`, with each different prompt read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trl_fast.modeling.loading import base_model

from .engine import Rollout, SamplingSettings, check_prompts

# Arguments of `generate` that would give something else than one sampled row a prompt.
_ONE_ROW_EACH = {"num_return_sequences": 1, "num_beams": 1, "return_dict_in_generate": False}

Model = PreTrainedModel | PeftModel


class TransformersEngine:
    """Samples from the policy itself. Keys and values of a prompt are computed once, for all of its completions.

    The model is in eval mode while it generates, so dropout is off, unlike in TRL; its modes come back afterwards.

    Args:
        model: the policy, or a function that gives it (unwrapped) each time.
        eos_token_ids: the tokens that end a completion, see `end_token_ids`.
        pad_token_id: what rows of a batch are padded with; it may be an end token.

    Raises:
        ValueError: there is no end token or no pad token.
    """

    def __init__(
        self, model: Model | Callable[[], Model], eos_token_ids: Iterable[int], pad_token_id: int | None
    ) -> None:
        self.eos_token_ids = sorted(eos_token_ids)
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids is empty, so no completion would ever end; name at least one token")
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set the tokenizer's pad_token, to its eos_token if need be")
        self.pad_token_id = pad_token_id
        self._get_model = (lambda: model) if isinstance(model, torch.nn.Module) else model

    def generate(self, prompt_ids: list[list[int]], settings: SamplingSettings) -> Rollout:
        """Samples one completion for each prompt, without log-probabilities.

        Raises:
            ValueError: a prompt is empty or leaves no room for its completion, or generation_kwargs ask for something
                else than one sampled completion a prompt.
        """
        model: Any = self._get_model()
        config = self._generation_config(settings)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_prompts(prompt_ids, config.max_new_tokens, limit)
        input_ids, attention_mask = self._left_padded(prompt_ids, model.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        with _generating(model), torch.no_grad():
            if can_share_prompts(model, config):
                inputs["past_key_values"] = self._prompt_cache(model, prompt_ids, input_ids, attention_mask)
            rows = model.generate(**inputs, generation_config=config)[:, input_ids.shape[1] :].tolist()
        ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
        return Rollout(prompt_ids, [_up_to_end(row, ends) for row in rows])

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Does nothing: the engine samples from the policy itself."""

    def _generation_config(self, settings: SamplingSettings) -> GenerationConfig:
        extra = settings.generation_kwargs or {}
        for name, only in _ONE_ROW_EACH.items():
            if extra.get(name, only) != only:
                raise ValueError(f"generation_kwargs: {name}={extra[name]!r} cannot be used; leave it out")
        values = {
            "max_new_tokens": settings.max_completion_length,
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p,
            "repetition_penalty": settings.repetition_penalty,
            "cache_implementation": settings.cache_implementation,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": self.eos_token_ids,
            # Training switches the model's own default off.
            "use_cache": True,
            "disable_compile": True,
        }
        return GenerationConfig(**{**values, **_ONE_ROW_EACH, **extra})

    def _left_padded(self, rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and mask, both (B, longest row) int64, padded on the left: a batch grows at the right."""
        width = max(map(len, rows))
        ids = [[self.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _prompt_cache(
        self, model: Model, prompt_ids: list[list[int]], input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> DynamicCache | None:
        """Returns keys and values of each prompt but its last token, whose logits count; None if none is shared."""
        prompts = [tuple(prompt) for prompt in prompt_ids]
        # The first row of each different prompt.
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
        if len(first) == len(prompts) or input_ids.shape[1] == 1:
            return None
        rows = sorted(first.values())
        cache = DynamicCache(config=_cache_config(model))
        # One token that nobody reads: so the model gets its prompts in exactly the way that `generate` gives them.
        config = GenerationConfig(
            max_new_tokens=1, do_sample=True, pad_token_id=self.pad_token_id, use_cache=True, disable_compile=True
        )
        cast("Any", model).generate(
            input_ids=input_ids[rows],
            attention_mask=attention_mask[rows],
            past_key_values=cache,
            generation_config=config,
        )
        cache.crop(-1)
        place = {row: index for index, row in enumerate(rows)}
        cache.batch_select_indices(torch.tensor([place[first[prompt]] for prompt in prompts], device=input_ids.device))
        return cache


def can_share_prompts(model: Model, config: GenerationConfig) -> bool:
    """Says whether keys and values of a prompt can be computed once and handed to `generate` for several rows.

    Every layer must keep all keys and values and nothing else: states of state-space layers, sliding windows and
    caches of a fixed size are left to `generate`.
    """
    # `generate` takes either the name of a cache or a cache.
    named = config.cache_implementation or model.generation_config.cache_implementation
    if named is not None or not config.use_cache or config.prefill_chunk_size is not None:
        return False
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    inner = base_model(model)
    if inner.config.is_encoder_decoder or getattr(inner, "_is_stateful", False):
        return False
    layers = DynamicCache(config=_cache_config(model)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _cache_config(model: Model) -> Any:
    return base_model(model).config.get_text_config(decoder=True)


def _up_to_end(row: list[int], ends: set[int]) -> list[int]:
    length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
    return row[:length]


@contextmanager
def _generating(model: Model) -> Iterator[None]:
    """Switches to eval mode without gradient checkpointing, which would drop the cache, and back."""
    modes = [(module, module.training) for module in model.modules()]
    modules: list[Any] = [*model.modules()]
    checkpointing = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    model.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, training in modes:
            module.training = training
