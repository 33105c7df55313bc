"""Splits conversations into sequences, one for each turn of the assistant with the context that it has at inference.

Templates of reasoning models drop the thoughts of earlier turns, so that no single sequence shows every turn as the
model will write it. Here a turn is rendered as it is when the conversation ends with it. What the turns of one
conversation begin alike with is a prefix tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from .formats import is_conversational
from .training_chat_template import default_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What drops the thought of every turn, the last one too, and what drops only those of earlier turns: DeepSeek-R1's.
_DROPPED = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
_DROPPED_EARLIER = _DROPPED.replace("in content %}", "in content and not loop.last %}", 1)


def turn_chat_template(processing_class: PreTrainedTokenizerBase) -> str | None:
    """Returns the chat template that renders a turn as the model writes it; None if it is the tokenizer's own.

    It differs where the tokenizer's own template drops even the thought of the turn that is to be learned.

    Raises ValueError if the tokenizer has no chat template.
    """
    template = default_template(processing_class.chat_template)
    if template is None:
        raise ValueError("processing_class has no chat_template, which conversations need; set one.")
    return template.replace(_DROPPED, _DROPPED_EARLIER) if _DROPPED in template else None


def turn_rows(example: dict[str, Any], *, completion_only: bool) -> list[dict[str, Any]]:
    """Returns a row of `prompt` and `completion` for each of the assistant's turns, with the row's other columns.

    The example has `messages`, or `prompt` and `completion`; the turns of the prompt are left out if
    `completion_only`.

    Raises ValueError if the row is no conversation, there is no such turn, or the conversation begins with one.
    """
    columns = {name: value for name, value in example.items() if name not in ("messages", "prompt", "completion")}
    if not is_conversational(example):
        raise ValueError(f"assistant_turns='separately' needs conversations, but the row has {sorted(example)}.")
    messages = example["messages"] if "messages" in example else example["prompt"] + example["completion"]
    first = len(example["prompt"]) if completion_only and "completion" in example else 0
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not turns:
        raise ValueError("no message has the role 'assistant', so no turn can be learned; add one, or remove the row.")
    if turns[0] == 0:
        raise ValueError(
            "the conversation begins with the assistant's message, which nothing prompts; put a message before it, or "
            "set assistant_turns='together'."
        )
    return [{**columns, "prompt": messages[:i], "completion": [messages[i]]} for i in turns]


def joined_rows(turns: Iterable[dict[str, list[int]]]) -> dict[str, list[int]]:
    """Returns one row of `input_ids`, `labels` and `seq_lengths` that holds the sequences of all turns."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for turn in turns:
        row["input_ids"] += turn["input_ids"]
        row["labels"] += turn["labels"]
        row["seq_lengths"].append(len(turn["input_ids"]))
    return row


def changed_turns(
    row: dict[str, list[int]], change: Callable[[list[int], list[int]], dict[str, list[int]] | None]
) -> dict[str, list[int]]:
    """Returns a row of several sequences with each of them changed.

    change: from token ids and labels to a row of them; None leaves the sequence out.
    """
    changed = (change(*turn) for turn in split_turns(row))
    return joined_rows(turn for turn in changed if turn is not None)


def split_turns(row: dict[str, list[int]]) -> list[tuple[list[int], list[int]]]:
    """Returns token ids and labels of each sequence of a row that holds several."""
    bounds = pairwise([0, *accumulate(row["seq_lengths"])])
    return [(row["input_ids"][start:end], row["labels"][start:end]) for start, end in bounds]
