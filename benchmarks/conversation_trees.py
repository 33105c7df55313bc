"""Counts the tokens of conversations whose turns are learned one by one: as separate sequences, and as prefix trees.

Real conversations of two packages are counted, where they are installed:

    pip install --no-deps chitchat-dataset==0.9.0 bfcl-eval==2026.3.23

`chats` are talks between people (the second one stands for the assistant), `tool calls` the questions of several turns
of the Berkeley Function Calling Leaderboard with the calls that answer them. Their turns have no thoughts; with
`--thought_words N` each turn of the assistant gets one of N of the conversation's own words, which is made up.
A file of rows with `messages`, and maybe `tools`, is counted with `--data FILE`.

Sequences are those that SFT makes with `assistant_turns="separately"`, in the tokens of SmolLM2; a tree is that of one
conversation.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.smollm2 import smollm2_folder
from trl_fast.data.assistant_turns import split_turns, turn_chat_template
from trl_fast.data.segments import segments_of
from trl_fast.data.sft_batch import LabelledCollator
from trl_fast.data.sft_dataset import SFTFormat, tokenize_turns
from trl_fast.settings.batch_layouts import SHARED_PREFIX

# SmolLM2's own keeps every turn as it was; the others drop thoughts, or the marks of an empty one, of earlier turns.
TEMPLATES = ("SmolLM2", "qwen3", "deepseek_r1_distill", "gptoss")


class Counts(NamedTuple):
    """Holds the counts of some conversations: turns, tokens apart and in trees, and levels of the deepest tree."""

    conversations: int
    turns: int
    apart: int
    shared: int
    levels: int


def count(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, thought_words: int, *, thought_beside: bool
) -> Counts:
    """Counts the tokens of rows of `messages`, as separate sequences and as a tree each."""
    how = SFTFormat(separates_turns=True, chat_template=turn_chat_template(tokenizer))
    collator = LabelledCollator(0, SHARED_PREFIX, joins=True)
    turns = apart = shared = levels = 0
    for row in rows:
        row = with_thoughts(row, thought_words, beside=thought_beside) if thought_words else row
        tokens = tokenize_turns(row, tokenizer, how)
        batch = collator.collate([tokens])
        assert batch.tree_lengths is not None  # of a row without padding
        turns += len(split_turns(tokens))
        apart += batch.num_tokens
        shared += batch.input_ids.numel()
        levels = max([levels, *(segment.depth + 1 for segment in segments_of(batch.tree_lengths))])
    return Counts(len(rows), turns, apart, shared, levels)


def with_thoughts(row: dict[str, Any], words: int, *, beside: bool) -> dict[str, Any]:
    """Returns the row with a thought of so many of its own words before each of the assistant's messages.

    beside: whether it stands in the message's field `thinking`, instead of in its text.
    """
    text = " ".join(str(message["content"]) for message in row["messages"]).split()
    messages = []
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            thought = " ".join(text[(index + place) % len(text)] for place in range(words))
            more = (
                {"thinking": thought}
                if beside
                else {"content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}
            )
            message = {**message, **more}
        messages.append(message)
    return {**row, "messages": messages}


# ---- real conversations


def chats(limit: int) -> list[dict[str, Any]]:
    """Returns talks between two people, the second one as the assistant, from where the first one says something."""

    def conversations() -> Iterator[dict[str, Any]]:
        for talk in json.loads(_data_of("chitchat_dataset", "dataset.json").read_text()).values():
            texts = [" ".join(part["text"] for part in said).strip() for said in talk["messages"]]
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
            if len(messages) > 3 and all(texts):
                yield {"messages": messages}

    return [*islice(conversations(), limit)]


def tool_calls(limit: int) -> list[dict[str, Any]]:
    """Returns tasks of several turns, with the calls that answer them; each call's result is `{"status": "done"}`."""
    data = _data_of("bfcl_eval", "data")
    name = "BFCL_v4_multi_turn_base.json"
    answers = {row["id"]: row["ground_truth"] for row in _rows(data / "possible_answer" / name)}
    docs = {path.stem: _rows(path) for path in (data / "multi_turn_func_doc").iterdir()}
    found = []
    for task in islice(_rows(data / name), limit):
        messages: list[dict[str, Any]] = []
        for asked, calls in zip(task["question"], answers[task["id"]], strict=True):
            messages += asked
            for call in calls:
                messages.append({"role": "assistant", "content": "", "tool_calls": [_call(call)]})
                messages.append({"role": "tool", "name": call.partition("(")[0], "content": '{"status": "done"}'})
        names = {path.split(".")[-1] for path in task["path"]} | {
            c.partition("(")[0] for a in answers[task["id"]] for c in a
        }
        tools = [tool for group in docs.values() for tool in group if tool["name"] in names]
        found.append({"messages": messages, "tools": [{"type": "function", "function": tool} for tool in tools]})
    return found


def _call(text: str) -> dict[str, Any]:
    """Reads a call written as Python does; arguments without a name are numbered."""
    call: Any = ast.parse(text, mode="eval").body
    arguments = {f"argument_{i}": ast.literal_eval(value) for i, value in enumerate(call.args)}
    arguments |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return {"type": "function", "function": {"name": ast.unparse(call.func), "arguments": arguments}}


def _rows(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _data_of(package: str, name: str) -> Path:
    """Returns a package's file or folder; the package is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / name


SOURCES: dict[str, Callable[[int], list[dict[str, Any]]]] = {"chats": chats, "tool calls": tool_calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of rows with messages, one a line")
    parser.add_argument("--limit", type=int, default=200, help="conversations of each source")
    parser.add_argument("--thought_words", type=int, default=0, help="words of a made-up thought in each turn")
    args = parser.parse_args()
    sources = SOURCES if args.data is None else {args.data.name: lambda limit: _rows(args.data)[:limit]}
    table = Table("conversations", "template", "turns", "tokens apart", "in trees", "apart / trees", "levels")
    console = Console(width=110)
    for name, read in sources.items():
        try:
            rows = read(args.limit)
        except FileNotFoundError as error:
            console.print(f"{name}: {error}; see --help.")
            continue
        for template in TEMPLATES:
            tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
            if template != "SmolLM2":
                tokenizer.chat_template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
            try:
                found = count(rows, tokenizer, args.thought_words, thought_beside=template == "gptoss")
            except Exception as error:  # a template that does not write such conversations
                console.print(f"{name}, {template}: {type(error).__name__}: {error}")
                continue
            numbers = (found.turns, found.apart, found.shared)
            ratio = f"{found.apart / found.shared:.2f}"
            table.add_row(
                f"{found.conversations} {name}", template, *(f"{n:,}" for n in numbers), ratio, str(found.levels)
            )
    console.print(table)


if __name__ == "__main__":
    main()
