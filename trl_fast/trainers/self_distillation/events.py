"""Tells callbacks of what TRL's self-distillation trainers do between the events of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .samples import TaughtSamples

_OF_TEACHER = ("teacher_input_ids", "teacher_attention_mask", "self_distillation_mask")
_OF_BATCH = ("old_per_token_logps", "prompt_ids", "completion_ids", *_OF_TEACHER)
_OF_CONTEXTS = (*_OF_TEACHER, "completion_mask")


def call_event(trainer: Any, name: str, payload: Callable[[], dict[str, Any]]) -> None:
    """Calls the method `name` of each callback that has it, with what transformers gives, and the payload."""
    for callback in trainer.callback_handler.callbacks:
        function = getattr(callback, name, None)
        if function is None:
            continue
        given = {"model": trainer.model, "processing_class": trainer.processing_class, **payload()}
        function(args=trainer.args, state=trainer.state, control=trainer.control, **given)


def tell_of_batch(trainer: Any, samples: TaughtSamples) -> None:
    """Calls `on_self_distillation_batch_prepared` with a generation's tensors, padded as TRL's are."""
    _tell(trainer, samples, "on_self_distillation_batch_prepared", _OF_BATCH)


def tell_of_contexts(trainer: Any, samples: TaughtSamples) -> None:
    """Calls `on_teacher_context_built` in the same way."""
    _tell(trainer, samples, "on_teacher_context_built", _OF_CONTEXTS)


def _tell(trainer: Any, samples: TaughtSamples, name: str, payload: tuple[str, ...]) -> None:
    given = (samples, trainer.tokenizer.pad_token_id, trainer.accelerator.device)

    def chosen() -> dict[str, Any]:
        padded = _padded(*given)
        return {key: padded[key] for key in payload if key in padded}

    call_event(trainer, name, chosen)


def _padded(samples: TaughtSamples, pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """Returns the tensors of S completions: prompts are padded on the left, completions on the right."""

    def rows(sequences: list[list[int]], value: int, side: str) -> torch.Tensor:
        return pad_sequence([torch.tensor(ids) for ids in sequences], True, value, side).to(device)

    def ones(sequences: list[list[int]]) -> list[list[int]]:
        return [[1] * len(ids) for ids in sequences]

    taught, completions = samples.of_teacher().prompt_ids, samples.completion_ids
    completion_ids = rows(completions, pad_token_id, "right")
    masks = rows(ones(taught), 0, "left"), rows(ones(completions), 0, "right")
    old, untaught = samples.old_logprobs, samples.untaught
    return {
        **({} if untaught is None else {"self_distillation_mask": (~untaught).float().to(device)}),
        "completion_mask": masks[1] * (~samples.excluded).long()[:, None].to(device),
        "old_per_token_logps": None if old is None else pad_sequence(old, True, 0.0).to(device),
        "prompt_ids": rows(samples.prompt_ids, pad_token_id, "left"),
        "completion_ids": completion_ids,
        "teacher_input_ids": torch.cat([rows(taught, pad_token_id, "left"), completion_ids], 1),
        "teacher_attention_mask": torch.cat(masks, 1),
    }
