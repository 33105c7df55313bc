"""Tells by which settings a trainer samples now: its arguments, and what was changed in its generation_config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from trl_fast.modeling.loading import base_model
from trl_fast.rollout import SamplingSettings

# Fields that say nothing of sampling.
_NOT_SETTINGS = {"transformers_version", "disable_compile"}


def suppressed_tokens(trainer: Any) -> list[int]:
    """Returns the tokens that are never sampled: a trainer's own, and those that stand for images and videos.

    One of these would have no image. TRL has images' only.
    """
    own = list(trainer.unsampled_tokens)
    if trainer.images is None:
        return own
    video = getattr(base_model(trainer.model).config, "video_token_id", None)
    return [*own, trainer.images.layout.image_token_id, *([video] if isinstance(video, int) else [])]


class Sampling:
    """Holds the settings by which a trainer samples.

    Args:
        trainer: a `GroupTrainer`, with arguments, a tokenizer and end tokens.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._config: GenerationConfig | None = None
        # What the arguments said when the config was last shown.
        self._said: dict[str, Any] = {}

    @property
    def end_ids(self) -> list[int]:
        """Returns the tokens that end a completion, the tokenizer's first."""
        ends, eos = self._trainer.end_ids, self._trainer.tokenizer.eos_token_id
        return [*({eos} & ends), *sorted(ends - {eos})]

    def arguments(self) -> dict[str, Any]:
        """Returns what the trainer's arguments say, under the names of transformers' `generate`."""
        args, tokenizer = self._trainer.args, self._trainer.tokenizer
        given = dict(args.generation_kwargs or {})
        suppressed = [*suppressed_tokens(self._trainer), *(given.pop("suppress_tokens", None) or ())]
        return {
            "max_new_tokens": getattr(args, args.length_setting),
            "do_sample": True,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": self.end_ids,
            **{name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p")},
            "repetition_penalty": args.repetition_penalty,
            "cache_implementation": args.cache_implementation,
            **({"suppress_tokens": suppressed} if suppressed else {}),
            **given,
        }

    @property
    def config(self) -> GenerationConfig:
        """Returns the settings as transformers has them; what is changed in it counts from the next rollout on."""
        fresh = self._fresh()
        if self._config is None:
            self._config = fresh
        else:
            for name in fresh.to_dict().keys() - self._changes().keys():
                setattr(self._config, name, getattr(fresh, name))
        self._said = fresh.to_dict()
        return self._config

    @config.setter
    def config(self, config: GenerationConfig) -> None:
        self._config, self._said = config, self._fresh().to_dict()

    def settings(self) -> SamplingSettings:
        """Returns the settings of the next rollout."""
        args = self._trainer.args
        settings = args.sampling_settings()
        changes = self._changes()
        if not changes:
            return settings
        return replace(settings, generation_kwargs={**(args.generation_kwargs or {}), **changes})

    def _fresh(self) -> GenerationConfig:
        return GenerationConfig(**self.arguments(), disable_compile=True)

    def _changes(self) -> dict[str, Any]:
        """Returns what was changed in the config since it was shown."""
        if self._config is None:
            return {}
        present = self._config.to_dict()
        return {
            name: value
            for name, value in present.items()
            if name not in _NOT_SETTINGS and not name.startswith("_") and value != self._said.get(name)
        }
