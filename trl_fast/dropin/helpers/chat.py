"""Shows samples of completions, and renames parts of messages for vLLM, as TRL does for scripts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from trl_fast.console import make_console


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
