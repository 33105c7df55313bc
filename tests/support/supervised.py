"""Small datasets of every kind that SFTTrainer takes."""

from __future__ import annotations

import json
from collections.abc import Callable

from datasets import Dataset

from .tokenizer import build_tokenizer
from .training import made_once

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def _question(i: int) -> str:
    return f"What color is {i}?"


def _answer(i: int) -> str:
    return f" It is blue {i * 7}" * (1 + i % 3)


def _turns(i: int) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": _question(i)}, {"role": "assistant", "content": _answer(i)}]
    more = [{"role": "user", "content": "The sea?"}, {"role": "assistant", "content": f"green {i}"}]
    return turns + more * (i % 2)


def _tokens(i: int) -> list[int]:
    return build_tokenizer()(_question(i) + _answer(i))["input_ids"]


ROWS: dict[str, Callable[[int], dict]] = {
    "text": lambda i: {"text": _question(i) + _answer(i)},
    "text with an end": lambda i: {"text": _question(i) + _answer(i) + "<|im_end|>"},
    "story": lambda i: {"story": _question(i) + _answer(i), "id": i},
    "prompt and completion": lambda i: {"prompt": _question(i), "completion": _answer(i)},
    "messages": lambda i: {"messages": _turns(i)},
    "conversations": lambda i: {
        "conversations": [{"from": turn["role"], "value": turn["content"]} for turn in _turns(i)]
    },
    "prompt and completion messages": lambda i: {"prompt": _turns(i)[:1], "completion": _turns(i)[1:]},
    "tools": lambda i: {"messages": _turns(i), "tools": [TOOL]},
    "tools as JSON": lambda i: {"prompt": _turns(i)[:1], "completion": _turns(i)[1:2], "tools": json.dumps([TOOL])},
    "template arguments": lambda i: {
        "prompt": _turns(i)[:1],
        "completion": _turns(i)[1:],
        "chat_template_kwargs": {"thinking": False},
    },
    "tokens": lambda i: {"input_ids": _tokens(i)},
    "tokens and labels": lambda i: {"input_ids": _tokens(i), "labels": [-100, -100, -100, *_tokens(i)[3:]]},
    "tokens and completions": lambda i: {
        "input_ids": _tokens(i),
        "completion_mask": [0] * 5 + [1] * (len(_tokens(i)) - 5),
    },
    "tokens and assistant": lambda i: {
        "input_ids": _tokens(i),
        "assistant_masks": [int(4 < place < 9) for place in range(len(_tokens(i)))],
    },
}


@made_once
def sft_rows(kind: str, count: int = 20) -> Dataset:
    """`count` rows of a kind, of different lengths."""
    return Dataset.from_list([ROWS[kind](i) for i in range(count)])
