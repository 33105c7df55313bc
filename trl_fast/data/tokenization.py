"""Turns prompts and completions, text or messages, into token ids."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .formats import is_conversational
from .row_places import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_warned_of_prompt_tail = False


def tokenize_preference(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Returns `prompt_ids`, `chosen_ids` and `rejected_ids` of a row with `prompt`, `chosen` and `rejected`.

    Messages go through the chat template, with the row's `tools` (a list, or one as JSON) and `chat_template_kwargs`.
    Text gets the tokenizer's default special tokens, and completions the EOS token if they do not end with it.

    Prompt and completion are tokenized together, because tokens may merge where they meet. The completion starts
    where prompt + chosen or prompt + rejected first departs from the prompt's own tokens; the end of the prompt after
    that place is left out, with one warning a process.
    """
    prompt_ids, (chosen, rejected) = tokenize_completions(example, ("chosen", "rejected"), processing_class)
    return {"prompt_ids": prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected}


def tokenize_unpaired(example: dict[str, Any], processing_class: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Returns `prompt_ids` and `completion_ids` of a row, as `tokenize_preference` does."""
    prompt_ids, (completion,) = tokenize_completions(example, ("completion",), processing_class)
    return {"prompt_ids": prompt_ids, "completion_ids": completion}


def tokenize_completions(
    example: dict[str, Any], columns: tuple[str, ...], processing_class: PreTrainedTokenizerBase
) -> tuple[list[int], list[list[int]]]:
    """Returns the token ids of the prompt, and of the completion in each column, as `tokenize_preference` does."""
    if is_conversational(example):
        options = template_options(example)
        prompt_ids = _template_ids(processing_class, example["prompt"], add_generation_prompt=True, **options)
        full = [_template_ids(processing_class, example["prompt"] + example[column], **options) for column in columns]
    else:
        eos_token = processing_class.eos_token
        prompt_ids = processing_class(text=example["prompt"])["input_ids"]
        full = [
            processing_class(text=example["prompt"] + end_with(example[column], eos_token))["input_ids"]
            for column in columns
        ]
    start = min(common_prefix_length(prompt_ids, ids) for ids in full)
    if start < len(prompt_ids):
        warn_of_prompt_tail(str(processing_class.decode(prompt_ids[start:])))
    return prompt_ids[:start], [ids[start:] for ids in full]


def template_options(example: dict[str, Any]) -> dict[str, Any]:
    """Returns a row's arguments of the chat template: `tools`, a list or one as JSON, and `chat_template_kwargs`.

    Raises ValueError if the tools are no valid JSON, no list, or the arguments no dict.
    """
    tools, arguments = example.get("tools"), example.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools': {shorten(tools)} is no valid JSON: {error}") from error
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", arguments, dict)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"column {column!r}: {shorten(value)} is of type {type(value).__name__}; expected a {kind.__name__}"
            )
    return {"tools": tools, **arguments}


def common_prefix_length(ids: Sequence[object], other_ids: Sequence[object]) -> int:
    """Counts the leading tokens that two sequences share."""
    shorter = min(len(ids), len(other_ids))
    return next((index for index in range(shorter) if ids[index] != other_ids[index]), shorter)


def _template_ids(processing_class: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> list[int]:
    encoded: Any = processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return encoded["input_ids"]


def end_with(text: str, ending: str) -> str:
    """Returns the text, with the ending put behind it if it does not end so."""
    return text if text.endswith(ending) else text + ending


def warn_of_prompt_tail(tail: str) -> None:
    """Says once a process that a prompt's end is left out."""
    global _warned_of_prompt_tail
    if not _warned_of_prompt_tail:
        _warned_of_prompt_tail = True
        logger.warning(
            f"A prompt, tokenized alone, ends with {tail!r}, which the prompt followed by its completion does not "
            "have there: the chat template renders the two differently, or tokens merge where they meet. The "
            "completion starts at the first difference and this end of the prompt is left out, so the model is "
            "trained on another context than it will see. Other rows may be affected; this is said once."
        )
