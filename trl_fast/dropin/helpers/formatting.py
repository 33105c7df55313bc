"""Makes formatting functions for datasets, as scripts for TRL up to 0.25 use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase


def conversations_formatting_function(
    tokenizer: PreTrainedTokenizerBase, messages_field: str, tools: list | None = None
) -> Callable[[dict[str, Any]], Any]:
    """Makes the function that renders a row's messages, or those of each row of a batch, as text."""

    def render(rows: dict[str, Any]) -> Any:
        messages = rows[messages_field]
        if isinstance(messages[0], list):
            return [tokenizer.apply_chat_template(each, tokenize=False, tools=tools) for each in messages]
        return tokenizer.apply_chat_template(messages, tokenize=False, tools=tools)

    return render


def instructions_formatting_function(tokenizer: PreTrainedTokenizerBase) -> Callable[[dict[str, Any]], Any]:
    """Makes the function that renders `prompt` and `completion`, of a row or of a batch, as a conversation's text."""

    def render_one(prompt: str, completion: str) -> Any:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def render(rows: dict[str, Any]) -> Any:
        if isinstance(rows["prompt"], list):
            return [render_one(*pair) for pair in zip(rows["prompt"], rows["completion"], strict=True)]
        return render_one(rows["prompt"], rows["completion"])

    return render


def get_formatting_func_from_dataset(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, tools: list | None = None
) -> Callable[[dict[str, Any]], Any] | None:
    """Makes the formatting function that fits a dataset's columns; None if they are of no known kind."""
    columns = set(dataset.column_names or ())
    for field in ("messages", "conversations"):
        if field in columns:
            return conversations_formatting_function(tokenizer, field, tools)
    return instructions_formatting_function(tokenizer) if columns == {"prompt", "completion"} else None
