"""Holds the questions about chat templates and tool calls that TRL answers for scripts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trl_fast.console import make_console
from trl_fast.data.training_chat_template import has_generation_marks, trains_stop_token
from trl_fast.rollout.responses import find_response_template, parse_message


def has_generation_markers(chat_template: str | dict[str, str]) -> bool:
    """Says whether a template marks what the assistant said; of named templates the `default` one counts."""
    return has_generation_marks(chat_template)


def is_chat_template_stop_token_trained(
    processing_class: PreTrainedTokenizerBase, chat_template: str | None = None
) -> bool:
    """Says whether a template (None: the tokenizer's own) marks the token that ends the assistant's turn."""
    return trains_stop_token(processing_class, chat_template)


def supports_tool_calling(processing_class: PreTrainedTokenizerBase) -> bool:
    """Says whether the chat template writes tool calls, with name and arguments, and their results."""
    try:
        find_response_template(processing_class)
    except ValueError as error:
        # A format that only the parser does not know is written all the same.
        return "in a format that is not known" in str(error)
    return True


def is_chat_template_prefix_preserving(processing_class: PreTrainedTokenizerBase) -> bool:
    """Says whether the chat template writes a tool call in the same way whether its result follows or not."""

    def tokens(messages: list[dict[str, Any]], **how: Any) -> list[int]:
        output: Any = processing_class.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
        return output["input_ids"]

    def is_preserved(arguments: dict[str, Any] | str) -> bool:
        call = {"type": "function", "function": {"name": "dummy", "arguments": arguments}}
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": "dummy"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        before = tokens(asked)
        answered = [*asked, {"role": "tool", "name": "dummy", "content": "dummy"}]
        return tokens(answered, add_generation_prompt=True)[: len(before)] == before

    try:
        return is_preserved({})
    except TypeError:
        # DeepSeek-V3's template takes arguments as text only.
        return is_preserved("{}")


def add_response_schema(processing_class: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a tokenizer the response template that reads the tool calls of its chat template.

    Raises:
        ValueError: the chat template writes no tool calls, or in a format that is not known.
    """
    tokenizer: Any = processing_class
    tokenizer.response_template = find_response_template(processing_class)
    return processing_class


def parse_response(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    prefix: list[int] | None = None,
    tools: list[dict | Callable] | None = None,
) -> dict[str, Any]:
    """Returns a completion as the assistant's message, by the tokenizer's response template (see parse_message).

    prefix: the tokens before it.
    """
    return parse_message(tokenizer, ids, prefix or [], tools)


def prepare_multimodal_messages_vllm(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages with the images of their parts under the names that vLLM gives them."""
    renamed = {"image": "image_pil"}

    def part_for_vllm(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        return {renamed.get(key, key): renamed["image"] if key == "type" else value for key, value in part.items()}

    return [
        {**message, "content": [part_for_vllm(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def print_prompt_completions_sample(
    prompts: list,
    completions: list,
    rewards: dict[str, list[float]],
    advantages: list[float] | None,
    step: int,
    num_samples: int | None = None,
    extra: dict[str, list] | None = None,
) -> None:
    """Prints a table of prompts and completions with their rewards and advantages.

    Args:
        prompts, completions: texts or lists of messages.
        num_samples: so many random rows; None: all.
        extra: further columns by name.
    """
    numbers = {**rewards, **({} if advantages is None else {"Advantage": advantages})}
    texts = {"Prompt": prompts, "Completion": completions}
    rows: Sequence[int] = range(len(prompts))
    if num_samples is not None and num_samples < len(prompts):
        rows = random.sample(rows, max(num_samples, 0))
    table = Table(expand=True, show_lines=True)
    for name in (*texts, *numbers, *(extra or {})):
        table.add_column(Text(name), justify="right" if name in numbers else "left")
    for row in rows:
        shown = [_as_text(values[row]) for values in texts.values()]
        shown += [Text(f"{values[row]:.2f}") for values in numbers.values()]
        table.add_row(*shown, *(_as_text(values[row]) for values in (extra or {}).values()))
    if len(rows):
        make_console().print(Panel(table, title=f"Step {step}", expand=False))


def _as_text(entry: Any) -> Text:
    if not (isinstance(entry, list) and all(isinstance(message, dict) for message in entry)):
        return Text(str(entry))
    return Text("\n\n").join(Text(f"{message.get('role', '').upper()}\n{_content(message)}") for message in entry)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text", "[IMAGE]") for part in content)
    calls = [call.get("function", {}) for call in message.get("tool_calls") or []]
    thoughts = [message.get("reasoning_content") or message.get("thinking") or ""]
    written = [f"{call.get('name', '?')}({call.get('arguments', {})})" for call in calls]
    return "\n".join(part for part in (*thoughts, content, *written) if part)
