"""Tells the formats of rows apart, and brings preference rows into the one with an explicit prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages")


def is_conversational(example: dict[str, Any]) -> bool:
    """Says whether one of the row's text columns is a list of messages, dicts with at least a `role`."""
    values = (example[column] for column in MESSAGE_COLUMNS if column in example)
    return any(
        isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]
        for value in values
    )


def extract_prompt(example: dict[str, Sequence]) -> dict[str, Sequence]:
    """Takes what `chosen` and `rejected` both begin with as `prompt`; both are text, or both lists of messages.

    A space before the first difference goes to the completions. If one of the two is a prefix of the other, its last
    element (character or message) stays a completion, so that none becomes empty.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shorter = min(len(chosen), len(rejected))
    split = next((index for index in range(shorter) if chosen[index] != rejected[index]), None)
    if split is None:
        split = max(shorter - 1, 0)
    elif split > 0 and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def maybe_extract_prompt(example: dict[str, Any]) -> dict[str, Any]:
    """Applies `extract_prompt` to rows without a prompt of the same kind as their completions.

    Some datasets repeat the question as a text `prompt` beside completions that are whole conversations: there, the
    prompt is taken from the conversations.
    """
    if "chosen" not in example or "rejected" not in example:
        return example
    if "prompt" in example:
        same_kind = is_conversational({"prompt": example["prompt"]}) == is_conversational(
            {"chosen": example["chosen"]}
        )
        if same_kind:
            return example
    return extract_prompt({"chosen": example["chosen"], "rejected": example["rejected"]})
