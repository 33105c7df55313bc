"""Converts conversations of other formats into messages, and renders messages as text."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .formats import is_conversational

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# The kinds of rows that have a chat template applied to them.
_KINDS = (
    {"messages"},
    {"prompt"},
    {"prompt", "completion"},
    {"prompt", "completion", "label"},
    {"prompt", "chosen", "rejected"},
    {"chosen", "rejected"},
)
_COMPLETIONS = ("chosen", "rejected", "completion")
_MESSAGE_COLUMNS = ("prompt", *_COMPLETIONS, "messages", "conversations")


def is_conversational_from_value(example: dict[str, Any]) -> bool:
    """Says whether the row's `conversations` are messages with `from` and `value`, not `role` and `content`."""
    messages = example.get("conversations")
    if not isinstance(messages, list) or not messages:
        return False
    return isinstance(messages[0], dict) and {"from", "value"} <= messages[0].keys()


def maybe_convert_to_chatml(example: dict[str, Any]) -> dict[str, Any]:
    """Returns the row with `from`, `value`, `conversations` renamed to `role`, `content`, `messages`.

    Rows that have no such names are the same afterwards. The row given is not changed.
    """
    converted = {
        column: _as_chatml(value) if column in _MESSAGE_COLUMNS else value for column, value in example.items()
    }
    if "conversations" in converted:
        converted["messages"] = converted.pop("conversations")
    return converted


def _as_chatml(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages
    renamed = {"from": "role", "value": "content"}
    return [
        {renamed.get(key, key): value for key, value in message.items()} if isinstance(message, dict) else message
        for message in messages
    ]


def apply_chat_template(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Renders the row's messages as text; `messages` become the column `text`.

    A prompt that ends with the user's or a tool's message is followed by the generation prompt, one that ends with the
    assistant's is left open. A completion is what the whole conversation has beyond the prompt, and the prompt is cut
    to what it shares with the whole conversation. `chat_template_kwargs` of the row and `template_kwargs` go to the
    template.

    Raises KeyError for columns that make up no known kind of row, ValueError for a prompt that ends with another role.
    """
    known = set(example) & set().union(*_KINDS)
    if known not in _KINDS:
        raise KeyError(f"Columns {sorted(known)}: expected one of {', '.join(str(sorted(kind)) for kind in _KINDS)}.")
    options = {"tools": tools or None, **(example.get("chat_template_kwargs") or {}), **template_kwargs}

    def render(messages: list[dict], **how: Any) -> str:
        text: Any = processing_class.apply_chat_template(messages, tokenize=False, **how, **options)
        return text

    if "messages" in example:
        return {"text": render(example["messages"])}
    completions = [column for column in _COMPLETIONS if column in example]
    if "prompt" not in example:
        return {column: render(example[column]) for column in completions}
    prompt = render(example["prompt"], **_ending(example["prompt"]))
    whole = {column: render(example["prompt"] + example[column]) for column in completions}
    # Some templates end the generation prompt with a token that the whole conversation does not have there.
    prompt = os.path.commonprefix([prompt, *whole.values()])
    output = {"prompt": prompt, **{column: text[len(prompt) :] for column, text in whole.items()}}
    return output | ({"label": example["label"]} if "label" in example else {})


def maybe_apply_chat_template(
    example: dict[str, Any],
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tools: list[dict | Callable] | None = None,
    **template_kwargs: Any,
) -> dict[str, Any]:
    """Applies `apply_chat_template` to conversational rows; returns other rows as they are."""
    if not is_conversational(example):
        return example
    return apply_chat_template(example, processing_class, tools, **template_kwargs)


def _ending(prompt: list[dict]) -> dict[str, bool]:
    role = prompt[-1]["role"]
    if role in ("user", "tool"):
        return {"add_generation_prompt": True, "continue_final_message": False}
    if role == "assistant":
        return {"add_generation_prompt": False, "continue_final_message": True}
    raise ValueError(f"prompt: the last message has the role {role!r}; expected 'user', 'tool' or 'assistant'.")
