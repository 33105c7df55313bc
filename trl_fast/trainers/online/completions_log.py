"""Keeps the completions of the last generation, shows them as a table and writes them into files."""

from __future__ import annotations

import importlib
import json
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import CommitScheduler
from rich.table import Table
from rich.text import Text

from trl_fast.console import make_console

# Loggers that take a table of completions: modules of these names, alike in what is used of them.
_TABLE_LOGGERS = {"wandb", "trackio"}
_STATE_FILE = "completions_log.json"


class CompletionsLog:
    """Keeps prompts, completions, rewards and advantages of the last `size` completions of all processes.

    size: None keeps all.

    Attributes:
        logs: under TRL's names, `prompt`, `completion`, `advantages` and `images` (those of each prompt and its
            completion; empty where none are logged), and by name `rewards` and `extra`.
    """

    def __init__(self, size: int | None) -> None:
        def column() -> deque:
            return deque(maxlen=size)

        self.logs: dict[str, Any] = {
            **{name: column() for name in ("prompt", "completion", "advantages", "images")},
            **{name: defaultdict(column) for name in ("rewards", "extra")},
        }

    def add(
        self,
        rewards: dict[str, list[float]],
        images: list[list] | None = None,
        advantage: list[float] | None = None,
        **columns: list[Any],
    ) -> None:
        """Adds one generation's columns, each with one value a completion; `rewards` by source.

        A column that only some generations have is None in the others. images: None: none are logged. advantage: None:
        the method has none.
        """
        self.logs["images"].extend(images or ())
        before, added = len(self.logs["prompt"]), len(columns["prompt"])
        self.logs["advantages"].extend(advantage or ())
        for name in ("prompt", "completion"):
            self.logs[name].extend(columns.pop(name))
        for kept, given in ((self.logs["rewards"], rewards), (self.logs["extra"], columns)):
            for name in [name for name in given if name not in kept]:
                kept[name].extend([None] * before)
            for name in kept:
                kept[name].extend(given.get(name, [None] * added))

    def save_to_checkpoint(self, folder: Path) -> None:
        """Writes the table as text, without images: later steps of a generation show it again."""
        logs = {**self.logs, "images": [[] for _ in self.logs["images"]]}
        (folder / _STATE_FILE).write_text(json.dumps(logs, default=_as_text))

    def load_from_checkpoint(self, folder: Path) -> None:
        """Reads the table; without one it begins anew."""
        if not (folder / _STATE_FILE).is_file():
            return
        for name, found in json.loads((folder / _STATE_FILE).read_text()).items():
            columns = [(self.logs[name], found)] if isinstance(found, list) else []
            columns += [] if columns else [(self.logs[name][key], values) for key, values in found.items()]
            for kept, values in columns:
                kept.extend(values)

    def frame(self, step: int, unique_prompts: bool = False) -> pd.DataFrame:
        """Returns all columns, with the step first and the advantage, if any, last; arguments of tool calls as JSON.

        unique_prompts: of each prompt only the first completion.
        """
        logs = self.logs
        shown = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["extra"], **logs["rewards"]}
        columns = {
            name: _of_one_kind([_with_text_arguments(value) for value in values]) for name, values in shown.items()
        }
        if logs["advantages"]:
            columns["advantage"] = list(logs["advantages"])
        frame = pd.DataFrame({"step": [step] * len(logs["prompt"]), **columns})
        return frame[~frame["prompt"].astype(str).duplicated()] if unique_prompts else frame

    def save(self, folder: Path, step: int) -> Path:
        """Writes the frame as completions_<step>.parquet."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"completions_{step:05d}.parquet"
        self.frame(step).to_parquet(path)
        return path

    def show(self, step: int, count: int | None, unique_prompts: bool = False) -> None:
        """Prints the first `count` completions (None: all), of each prompt only one if unique_prompts."""
        frame = self.frame(step, unique_prompts)
        table = Table(title=f"completions at step {step}", title_justify="left", show_lines=True)
        numbers = [*self.logs["rewards"], *(["advantage"] if self.logs["advantages"] else [])]
        texts = ("prompt", "completion")
        extras = [name for name in frame if name not in ("step", *texts, *numbers)]
        for name in (*texts, *numbers, *extras):
            table.add_column(name, justify="right" if name in numbers else "left")
        for _, row in frame.head(len(frame) if count is None else count).iterrows():
            shown = ("" if pd.isna(row[name]) else f"{row[name]:.2f}" for name in numbers)
            said, further = ([Text(message_text(row[name])) for name in names] for names in (texts, extras))
            table.add_row(*said, *shown, *further)
        make_console().print(table)


def report_completions(
    completions: CompletionsLog,
    step: int,
    *,
    folder: Path,
    count: int | None,
    unique_prompts: bool,
    loggers: Collection[str],
) -> None:
    """Reports the completions after a step: in the terminal, as a file, and as a table of loggers that take one.

    Args:
        folder: where the file is written.
        count: completions that are shown; None: all.
        unique_prompts: whether of each prompt only the first completion is shown.
        loggers: names of the loggers in use, as in `report_to`.
    """
    completions.show(step, count, unique_prompts)
    completions.save(folder, step)
    for name in _TABLE_LOGGERS & {*loggers}:
        logger = importlib.import_module(name)
        # No run of wandb is open before training.
        if getattr(logger, "run", True) is not None:
            frame = completions.frame(step, unique_prompts)
            images = completions.logs["images"]
            if any(images):
                shown = pd.Series([[logger.Image(image) for image in own] for own in images], name="image")
                frame = frame.join(shown)
            logger.log({"completions": logger.Table(dataframe=frame)})


def upload_completions(folder: Path, repo_id: str, *, private: bool | None, token: str | None) -> CommitScheduler:
    """Makes a Hub repository of data sets, and uploads a folder's tables to it every two minutes and at the end."""
    return CommitScheduler(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        every=2,
        private=private,
        token=token,
        allow_patterns="*.parquet",
    )


def message_text(value: Any) -> str:
    """Returns a conversation as text, a line for each message and tool call, after its role; other values as text."""
    if not (isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)):
        return str(value)
    lines = []
    for message in value:
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        said = [message.get("reasoning_content"), *_parts(message.get("content"))]
        said += [f"{call['name']}({call['arguments']})" for call in calls]
        lines.append(f"{message['role']}: " + "\n".join(str(part) for part in said if part))
    return "\n".join(lines)


def _parts(content: Any) -> list[Any]:
    """Returns the parts of a message's content as texts, an image as its place."""
    if not isinstance(content, list):
        return [content]
    return [part.get("text", f"[{part.get('type')}]") if isinstance(part, dict) else part for part in content]


def _of_one_kind(column: list[Any]) -> list[Any]:
    """Returns a column whose messages' contents are all lists of parts if one of them is, as a table needs it."""
    messages = [each for value in column if isinstance(value, list) for each in value if isinstance(each, dict)]
    if not any(isinstance(message.get("content"), list) for message in messages):
        return column

    def in_parts(message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message

    return [[in_parts(message) for message in value] if isinstance(value, list) else value for value in column]


def _with_text_arguments(value: Any) -> Any:
    """Returns a conversation whose tool calls have arguments that fit into one column, whatever their types."""
    if not (isinstance(value, list) and any(isinstance(item, dict) and item.get("tool_calls") for item in value)):
        return value
    return [{**message, "tool_calls": _text_calls(message.get("tool_calls"))} for message in value]


def _text_calls(calls: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not calls:
        return None
    functions = [call.get("function", call) for call in calls]
    texts = [json.dumps(function["arguments"], ensure_ascii=False, default=str) for function in functions]
    return [
        {"type": "function", "function": {**function, "arguments": text}}
        for function, text in zip(functions, texts, strict=True)
    ]


def _as_text(value: Any) -> Any:
    """Returns what JSON holds of a value: a column's list, else text."""
    return list(value) if isinstance(value, deque) else str(value)
