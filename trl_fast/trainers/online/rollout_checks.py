"""Checks rollouts before rewards are computed: one completion a prompt, known tokens, one value a token."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from trl_fast.rollout import Rollout, check_engine
from trl_fast.rollout.reward_answers import shown

_SHOWN_CHARACTERS = 80
_IMAGE_REMEDIES = {
    "prompt_ids": "make them with the processor, which writes a token for each part of an image",
    "completion_ids": "let the engine not sample that token (generation_kwargs: suppress_tokens, vLLM's logit_bias)",
}


def check_sources(
    tools: object, rollout_func: object | None, environment_factory: object | None, rollout_engine: object | None
) -> None:
    """Checks what a user gives to a trainer to make completions with.

    Raises:
        TypeError: a rollout_func cannot be called, or an engine lacks a method.
        ValueError: tools or an environment_factory beside a rollout_func.
    """
    if rollout_func is not None and not callable(rollout_func):
        raise TypeError(f"rollout_func: expected a function, got {shown(rollout_func)}")
    for name, given in (("tools", tools), ("environment_factory", environment_factory)):
        if given and rollout_func is not None:
            raise ValueError(f"{name} and rollout_func: a rollout_func makes whole completions; give one of them")
    if rollout_engine is not None:
        check_engine(rollout_engine)


def check_rollout(rollout: Rollout, prompts: list, vocab_size: int) -> Rollout:
    """Returns the rollout if it fits the prompts. Its tensors and arrays become lists.

    Args:
        rollout: of an engine or of a user's rollout_func.
        prompts: one for each completion, texts or conversations, for messages.
        vocab_size: entries of the policy's head.

    Raises:
        TypeError: it is no Rollout.
        ValueError: a list has another length than the prompts, is empty, or holds a token that the head does not have.
    """
    if not isinstance(rollout, Rollout):
        raise TypeError(
            f"the rollout engine returned {shown(rollout)} of type {type(rollout).__name__}; expected a "
            "trl_fast.rollout.Rollout"
        )
    for name in ("prompt_ids", "completion_ids"):
        lists = _rows(name, getattr(rollout, name), prompts, _token)
        setattr(rollout, name, lists)
        for ids, prompt in zip(lists, prompts, strict=True):
            if not ids:
                raise ValueError(f"the rollout's {name} are empty for the prompt {_short(prompt)}")
            if not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"the rollout's {name} for the prompt {_short(prompt)} have a token outside of the "
                    f"{vocab_size} entries of the model's head"
                )
    for name, shown_name, read in (
        ("logprobs", "logprobs", _logprob),
        ("mask", "mask (a rollout_func's env_mask)", _mask_value),
    ):
        if getattr(rollout, name) is not None:
            lists = _rows(shown_name, getattr(rollout, name), prompts, read)
            setattr(rollout, name, lists)
            _check_by_token(shown_name, lists, rollout.completion_ids, prompts)
    return rollout


def check_images(rollout: Rollout, prompts: list, image_token_id: int) -> None:
    """Checks that prompts and completions hold the tokens of their images, and no others that stand for images.

    Raises:
        ValueError: one does not.
    """
    lists = (rollout.prompt_ids, rollout.images), (rollout.completion_ids, rollout.completion_images)
    for name, (ids, images) in zip(("prompt_ids", "completion_ids"), lists, strict=True):
        for row, (tokens, prompt) in enumerate(zip(ids, prompts, strict=True)):
            own = () if images is None else images[row]
            found, expected = tokens.count(image_token_id), sum(image.inputs.num_tokens for image in own)
            if found != expected:
                raise ValueError(
                    f"the rollout's {name} for the prompt {_short(prompt)} have {found} tokens {image_token_id}, "
                    f"which stand for images, but {len(own)} images with {expected} of them; {_IMAGE_REMEDIES[name]}"
                )


def _rows(name: str, rows: Any, prompts: list, read: Callable[[Any], Any]) -> list[list]:
    """Returns a list of values for each prompt, each value read by `read`, which refuses some by TypeError."""
    rows = _as_list(rows)
    if not isinstance(rows, list):
        raise ValueError(f"the rollout's {name} are {shown(rows)}; expected a list with one list for each prompt")
    if len(rows) != len(prompts):
        raise ValueError(f"the rollout has {len(rows)} {name} for {len(prompts)} prompts; expected one each")
    return [_read_row(name, row, prompt, read) for row, prompt in zip(rows, prompts, strict=True)]


def _read_row(name: str, row: Any, prompt: object, read: Callable[[Any], Any]) -> list:
    row = _as_list(row)
    if not isinstance(row, list):
        raise ValueError(f"the rollout's {name} for the prompt {_short(prompt)} are {shown(row)}; expected a list")
    if _is_plain(row, read):
        return row
    values = []
    for value in row:
        try:
            values.append(read(value))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"the rollout's {name} for the prompt {_short(prompt)} hold {shown(value)} of type "
                f"{type(value).__name__}; expected {_EXPECTED[read]}"
            ) from None
    return values


def _is_plain(row: list, read: Callable[[Any], Any]) -> bool:
    """Says whether all values are as they should be: so are by far the most, which need no look at each."""
    kinds = set(map(type, row))
    return kinds <= _PLAIN[read] and (read is not _mask_value or set(row) <= {0, 1})


def _as_list(values: Any) -> Any:
    """Returns a list as it is, a tuple, tensor or array as a list, and anything else as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, tuple) else values


def _token(value: Any) -> int:
    return operator.index(value)


def _logprob(value: Any) -> float | None:
    # What an engine could not tell, or what it did not sample.
    if value is None:
        return None
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, Real):
        raise TypeError
    return float(value)


def _mask_value(value: Any) -> int:
    value = value.item() if hasattr(value, "item") else value
    if value not in (0, 1):
        raise ValueError
    return int(value)


_PLAIN: dict[Callable, set[type]] = {
    _token: {int},
    _logprob: {float, int, type(None)},
    _mask_value: {int, bool},
}
_EXPECTED: dict[Callable, str] = {
    _token: "integers",
    _logprob: "numbers, or None where there is none",
    _mask_value: "0 and 1",
}


def _check_by_token(name: str, lists: Iterable[list], completion_ids: list[list[int]], prompts: list) -> None:
    """Raises ValueError if there is not one value for each token of each completion."""
    for values, ids, prompt in zip(lists, completion_ids, prompts, strict=True):
        if len(values) != len(ids):
            raise ValueError(
                f"the rollout's {name} for the prompt {_short(prompt)} has {len(values)} values for a "
                f"completion of {len(ids)} tokens; expected one each"
            )


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
