"""Generates completions by transformers' `generate`, with each different prompt read once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from trl_fast.data.images.layout import ImageLayout
from trl_fast.parallel.agreement import largest_over_ranks
from trl_fast.parallel.partitions import whole_in_forward
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.ranges import COUNT

from .engine import Rollout, SamplingSettings, check_prompts
from .images import PromptImages, RolloutImage, image_keywords
from .prompt_cache import CACHE_ARGUMENT, Model, prompt_cache, why_prompts_are_not_shared

# Arguments of `generate` that would give something else than one row of tokens a prompt.
_ONE_ROW_EACH = {"num_return_sequences": 1, "return_dict_in_generate": False}

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Samples from the policy itself. What the model keeps of a prompt is computed once, for all of its completions.

    The model is in eval mode while it generates, so dropout is off, unlike in TRL; its modes come back afterwards.

    Args:
        model: the policy, or a function that gives it (unwrapped) each time.
        eos_token_ids: the tokens that end a completion, see `end_token_ids`.
        pad_token_id: what rows of a batch are padded with; it may be an end token.
        tokenizer: for stop strings; None: there can be none.
        image_layout: how the model wants to have images; None: it has none.
        suppressed: tokens that are never sampled, such as those that stand for images.
        gathered_weights: enters a context in which the policy can be called, and tells whether all processes have to
            make their forwards together in it, since weights stay sharded. The default is for one that is not sharded.

    Raises:
        ValueError: there is no end token or no pad token.
    """

    def __init__(
        self,
        model: Model | Callable[[], Model],
        eos_token_ids: Iterable[int],
        pad_token_id: int | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        gathered_weights: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(False),
        *,
        image_layout: ImageLayout | None = None,
        suppressed: Sequence[int] = (),
    ) -> None:
        self.eos_token_ids = sorted(eos_token_ids)
        if not self.eos_token_ids:
            raise ValueError("eos_token_ids is empty, so no completion would ever end; name at least one token")
        if pad_token_id is None:
            raise ValueError("pad_token_id is None; set the tokenizer's pad_token, to its eos_token if need be")
        self.pad_token_id, self.tokenizer, self.gathered_weights = pad_token_id, tokenizer, gathered_weights
        self.image_layout, self.suppressed = image_layout, list(suppressed)
        self._get_model = (lambda: model) if isinstance(model, torch.nn.Module) else model

    def generate(
        self, prompt_ids: list[list[int]], settings: SamplingSettings, images: PromptImages | None = None
    ) -> Rollout:
        """Samples one completion for each prompt, without log-probabilities.

        images: of each prompt, in the order of their tokens.

        Raises:
            ValueError: a prompt is empty or leaves no room for its completion, or generation_kwargs ask for something
                else than one completion a prompt.
        """
        model: Any = self._get_model()
        config = self._generation_config(model, settings)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_prompts(prompt_ids, config.max_new_tokens, limit)
        input_ids, attention_mask = self._left_padded(prompt_ids, model.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        own = [()] * len(prompt_ids) if images is None else images
        prompts = [
            (tuple(ids), tuple(image.digest for image in each)) for ids, each in zip(prompt_ids, own, strict=True)
        ]

        def images_of(rows: Iterable[int], ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return self._image_keywords([own[row] for row in rows], ids)

        stops = self._stop_strings(config, input_ids.shape[1])
        with self.gathered_weights() as together, _generating(model), torch.no_grad():
            inputs["synced_gpus"] = together
            if self._shares_prompts(prompts, model, config, together):
                inputs[CACHE_ARGUMENT] = prompt_cache(
                    model, prompts, self.pad_token_id, image_keywords_of=images_of, **inputs
                )
            else:
                inputs |= images_of(range(len(own)), input_ids)
            with _naming_extremes(config):
                rows = model.generate(
                    **inputs, generation_config=config, tokenizer=self.tokenizer, stopping_criteria=stops
                )
        rows = rows[:, input_ids.shape[1] :].tolist()
        ends = {config.eos_token_id} if isinstance(config.eos_token_id, int) else set(config.eos_token_id)
        for stop in stops:
            rows = [row[:length] for row, length in zip(rows, stop.lengths(len(rows)), strict=True)]
        return Rollout(prompt_ids, [_up_to_end(row, ends) for row in rows])

    def sync_weights(self, model: torch.nn.Module, step: int) -> None:
        """Does nothing: the engine samples from the policy itself."""

    def try_out(self, settings: SamplingSettings) -> None:
        """Generates a few tokens, where more than the usual is asked for: what cannot be is said before training.

        Random states stay.

        Raises:
            ValueError: an argument is unknown, or `generate` fails with it.
        """
        given = {**(settings.generation_kwargs or {})}
        _check_names(given)
        if not given and settings.cache_implementation is None:
            return
        model: Any = self._get_model()
        failure = self._failure(model, settings, given)
        if failure is None:
            return
        # What it works without is to blame.
        names = [name for name in given if not self._failure(model, settings, {**given, name: None})] or list(given)
        shown = ", ".join(f"{name}={given[name]!r}" for name in names) or (
            f"cache_implementation={settings.cache_implementation!r}"
        )
        raise ValueError(
            f"generation_kwargs: transformers' generation fails with {shown}: {type(failure).__name__}: "
            f"{' '.join(str(failure).split())}; change it or leave it out"
        ) from failure

    def _failure(self, model: Model, settings: SamplingSettings, given: dict[str, Any]) -> Exception | None:
        """Returns what two short prompts raise, which are of different lengths as prompts are."""
        least = given.get("min_new_tokens") or 0
        token = next(token for token in range(len(self.eos_token_ids) + 2) if token not in self.eos_token_ids)
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            short = {**given, "max_new_tokens": least + 2}
            with whole_in_forward(model), torch.random.fork_rng(devices):
                self.generate([[token], [token, token]], replace(settings, generation_kwargs=short))
        except Exception as error:
            return error
        return None

    def _image_keywords(
        self, images: Sequence[Sequence[RolloutImage]], input_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the keywords of the model's forward for the images of prompts `input_ids` (B, T)."""
        if not any(images):
            return {}
        if self.image_layout is None:
            raise ValueError("prompts have images, but the engine was made without an image_layout; give it one")
        return image_keywords([[image.inputs for image in own] for own in images], self.image_layout, input_ids)

    def _shares_prompts(
        self,
        prompts: list[tuple[tuple[int, ...], tuple[str, ...]]],
        model: Model,
        config: GenerationConfig,
        together: bool,
    ) -> bool:
        """Says whether each different prompt is computed once; where it is not but comes again, says why, once a run.

        prompts: their tokens and images. together: whether all processes make their forwards together, so that all of
        them have to do the same.
        """
        any_process = largest_over_ranks if together else int
        occur_again = any_process(int(len({*prompts}) < len(prompts)))
        are_short = any_process(int(min(len(ids) for ids, _ in prompts) == 1))
        if not occur_again:
            return False
        reason = why_prompts_are_not_shared(model, config)
        if are_short:
            reason = "a prompt has one token only, of which nothing comes before its last"
        if any_process(int(self._ends_with_image(prompts))):
            reason = "tokens of an image, or of a prompt with images, attend to the last one of a prompt"
        if reason is not None:
            _say_once(reason)
        return reason is None

    def _ends_with_image(self, prompts: list[tuple[tuple[int, ...], tuple[str, ...]]]) -> bool:
        layout = self.image_layout
        if layout is None:
            return False
        # Where whole prompts see each other, they end as an image does.
        return any(images and (layout.whole_prompts or ids[-1] == layout.image_token_id) for ids, images in prompts)

    def _generation_config(self, model: Model, settings: SamplingSettings) -> GenerationConfig:
        """Returns the settings of a generation; where they are silent, the model's generation config has the say."""
        extra = {name: value for name, value in (settings.generation_kwargs or {}).items() if value is not None}
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
        # Tokens that cannot be sampled stay so, whatever else the user leaves out.
        values["suppress_tokens"] = [*self.suppressed, *extra.pop("suppress_tokens", ())] or None
        config = GenerationConfig(**{**values, **extra, **_ONE_ROW_EACH})
        config.update(**model.generation_config.to_dict(), defaults_only=True)
        if (config.stop_strings is not None or config.token_healing) and self.tokenizer is None:
            raise ValueError("stop_strings and token_healing need a tokenizer; give the engine one")
        return config

    def _stop_strings(self, config: GenerationConfig, width: int) -> StoppingCriteriaList:
        """Returns what ends rows at stop strings and remembers where; beams have no rows that last, and no such thing.

        width: of the prompts. The config loses its stop strings.
        """
        if config.stop_strings is None or (config.num_beams or 1) > 1:
            return StoppingCriteriaList()
        strings, config.stop_strings = config.stop_strings, None
        return StoppingCriteriaList([_StopStrings(cast("Any", self.tokenizer), strings, width)])

    def _left_padded(self, rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and mask, both (B, longest row) int64, padded on the left: a batch grows at the right."""
        width = max(map(len, rows))
        ids = [[self.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning(f"Generation computes each prompt once a completion: {reason}.")


def _check_names(given: dict[str, Any]) -> None:
    """Raises ValueError if generation_kwargs hold what can be told to be wrong without a model."""
    known = vars(GenerationConfig())
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"generation_kwargs: {name!r} is no setting of transformers' generation"
                f"{did_you_mean(str(name), known)}"
            )
        if value is not None and _ONE_ROW_EACH.get(name, value) != value:
            raise ValueError(f"generation_kwargs: {name}={value!r} cannot be used; leave it out")
    longest = given.get("max_new_tokens")
    if longest is not None and longest not in COUNT:
        raise ValueError(f"generation_kwargs: max_new_tokens: expected {COUNT}, got {longest!r}")
    if given.get("max_length") is not None:
        raise ValueError(
            f"generation_kwargs: max_length={given['max_length']!r} would count prompts too; leave it out and set "
            "max_completion_length"
        )


class _StopStrings(StoppingCriteria):
    """Ends a row at a stop string, and remembers how long its completion was then: padding follows.

    width: tokens of the prompts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: str | list[str], width: int) -> None:
        self._inner, self._width = StopStringCriteria(tokenizer, strings), width
        self._lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = self._inner(input_ids, scores, **kwargs)
        if self._lengths is None:
            self._lengths = torch.zeros_like(done, dtype=torch.long)
        self._lengths[done & (self._lengths == 0)] = input_ids.shape[1] - self._width
        return done

    def lengths(self, rows: int) -> list[int | None]:
        """Returns the length of each completion that ended at a stop string; None for others."""
        return [None] * rows if self._lengths is None else [length or None for length in self._lengths.tolist()]


def _up_to_end(row: list[int], ends: set[int]) -> list[int]:
    length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
    return row[:length]


@contextmanager
def _naming_extremes(config: GenerationConfig) -> Iterator[None]:
    """Names the settings that may be to blame where no token can be sampled."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        names = ("temperature", "repetition_penalty", "top_p", "top_k", "min_p")
        raise RuntimeError(
            "the policy's probabilities are not finite once it is sampled with "
            f"{', '.join(f'{name}={getattr(config, name)}' for name in names)}; if the model's logits are finite, "
            "choose less extreme settings"
        ) from error


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
