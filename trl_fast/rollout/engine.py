"""Defines what an online method asks of generation: prompts in, completions out, whoever generates them."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.parallel.partitions import whole_shape
from trl_fast.settings.ranges import check_ranges

from .images import PromptImages


@dataclass(frozen=True)
class SamplingSettings:
    """Describes how completions are sampled, under TRL's names.

    Args:
        max_completion_length: tokens after which a completion is cut off, its end token included.
        temperature: divides the logits.
        top_p: the likeliest tokens that have this much probability together are kept; 1 keeps all.
        top_k: so many of the likeliest tokens are kept; 0 and -1 keep all.
        min_p: tokens less likely than this share of the likeliest one's probability are dropped; None drops none.
        repetition_penalty: divides the scores of tokens that occurred; 1 is none.
        generation_kwargs: further arguments of the engine's sampler, which win over those above.
        cache_implementation: of the keys and values, as transformers' `generate` takes it; None is its default.

    Raises:
        ValueError: a value is out of its range.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict | None = None
    cache_implementation: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        # vLLM's way to keep all tokens, which transformers does not know.
        object.__setattr__(self, "top_k", max(self.top_k, 0))


@dataclass
class Rollout:
    """Holds one completion a prompt, as plain lists without padding.

    Args:
        prompt_ids: the prompts' tokens.
        completion_ids: the completions' tokens, up to and including the first end token.
        logprobs: log-probabilities in nats of the completions' tokens under the distribution that they were sampled
            from, temperature and truncation included; None where the engine does not give them.
        mask: 1 for a completion's tokens that were sampled, 0 for others, which are not learned; None: all were.
        completions: the texts or messages that reward functions are to see; None: what the tokens say.
        images: those of the prompts, in the order of their tokens; None: there are none.
        completion_images: those that tools gave, in the order of their tokens; None: there are none.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]] | None = None
    mask: list[list[int]] | None = None
    completions: list | None = None
    images: PromptImages | None = None
    completion_images: PromptImages | None = None


class RolloutEngine(Protocol):
    """Generates completions with the policy's weights, its own or a copy that it is kept up to date with."""

    def generate(self, prompt_ids: list[list[int]], settings: SamplingSettings) -> Rollout:
        """Samples one completion for each entry; equal prompts in a row are read once.

        Where prompts have images, it is called with a third argument `images`, the `RolloutImage`s of each prompt.

        Raises:
            ValueError: a prompt is empty or leaves no room for its completion.
        """

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Gives the engine the policy's weights of an optimizer step; nothing to do where it has that step's."""


class EngineWrapper:
    """Stands before another engine, which has the weights."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Gives the engine the policy's weights of an optimizer step."""
        self.engine.sync_weights(model, step)

    @property
    def asks_together(self) -> bool:
        """Says whether all processes have to ask the engine together."""
        return asks_together(self.engine)

    def gathered_weights(self) -> AbstractContextManager[Any]:
        """Returns the context of the engine in which the policy's weights are whole."""
        return gathered_weights(self.engine)


def generate(
    engine: RolloutEngine, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None
) -> Rollout:
    """Samples one completion for each prompt; an engine that takes no images serves as long as there are none.

    Raises:
        ValueError: there are images, and the engine takes none; or as the engine.
    """
    if images is None:
        return engine.generate(prompt_ids, settings)
    if "images" not in inspect.signature(engine.generate).parameters:
        raise ValueError(
            f"rollout_engine: {type(engine).__name__}.generate takes no argument `images`, but prompts have images; "
            "give it one, as trl_fast.rollout.RolloutEngine describes it"
        )
    taking: Any = engine
    return taking.generate(prompt_ids, settings, images=images)


def asks_together(engine: RolloutEngine) -> bool:
    """Says whether all processes have to ask an engine together, though some of them have no prompts left."""
    return getattr(engine, "asks_together", False)


def gathered_weights(engine: RolloutEngine) -> AbstractContextManager[Any]:
    """Returns the context in which an engine that samples from a sharded policy has its weights whole.

    All processes enter and leave it together; within it each may ask the engine as often as it likes.
    """
    return engine.gathered_weights() if hasattr(engine, "gathered_weights") else nullcontext()


def check_engine(engine: object) -> None:
    """Raises TypeError if an object lacks a method of `RolloutEngine`."""
    for name in ("generate", "sync_weights"):
        if not callable(getattr(engine, name, None)):
            raise TypeError(
                f"rollout_engine: {type(engine).__name__} has no method {name}; expected an object with generate and "
                "sync_weights, as trl_fast.rollout.RolloutEngine describes them"
            )


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end a completion: all that the model's generation config names, and the tokenizer's.

    Raises:
        ValueError: there is none that the model's head has, so that no completion would come to an end.
    """
    named = model.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    if not ends:
        raise ValueError(
            "neither the tokenizer's eos_token nor the model's generation_config.eos_token_id is set, so no "
            "completion would ever end; set one of them"
        )
    head = model.get_output_embeddings()
    if head is not None and not any(0 <= token < whole_shape(head.weight)[0] for token in ends):
        raise ValueError(
            f"eos_token_id: none of the end tokens {sorted(ends)} is among the {whole_shape(head.weight)[0]} tokens "
            "of the model's head, so no completion would ever end; use the model's own tokenizer, or set its eos_token"
        )
    return ends


def check_prompts(prompt_ids: list[list[int]], max_completion_length: int, max_positions: int | None) -> None:
    """Refuses prompts that nothing can be generated for.

    max_positions: the most tokens, prompt and completion together, that the model takes; None if it has no limit.

    Raises:
        ValueError: there are no prompts, one is empty, or one is too long.
    """
    if not prompt_ids:
        raise ValueError("prompt_ids: there are no prompts to generate completions for")
    for index, prompt in enumerate(prompt_ids):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        if max_positions is not None and len(prompt) + max_completion_length > max_positions:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens, which with max_completion_length={max_completion_length} "
                f"are more than the {max_positions} positions of the model; shorten the prompt or the completions"
            )
