"""Writes the help of a command from the sources of its arguments, without importing what training needs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.field_docs import UNKNOWN, FieldDoc, read_fields
from trl_fast.trainers.methods import METHODS

from .commands import TRAIN, Command
from .flag_groups import GROUPS, grouped, is_common

WIDTH = 80
# Where the texts begin; a longer name has a line of its own.
_COLUMN = 34
# A command of so few flags shows them all.
_FEW = 40
# More choices than this are listed by `--help all` and `--help NAME` only.
_FEW_CHOICES = 8
# Stands for a space at which no line ends.
_JOINED = "\x1f"
_NOTES = (
    "In brackets: the default, where it is not none or false. A flag without a value",
    "is true, --no_FLAG is false. In YAML a flag stands without its dashes.",
)
# A first sentence that is shorter does not stand alone.
_FEW_LETTERS = 50
ALL = "all"
CONFIG = FieldDoc("config", "", "Path | None", None, (), "YAML file of flags, without their dashes; flags win.")
# Flags that no dataclass has: those of the launcher are the most used ones of `accelerate launch`.
LAUNCHER = (
    FieldDoc("num_processes", "", "int", 1, (), "Processes to train in, one for each GPU."),
    FieldDoc(
        "accelerate_config",
        "",
        "str | None",
        None,
        (),
        "How processes share the work: a file of accelerate's settings, or fsdp1, fsdp2, zero1, zero2, zero3, "
        "multi_gpu, single_gpu.\n\nAll flags of `accelerate launch` work too.",
    ),
)


def help_topic(arguments: Sequence[str]) -> str | None:
    """Returns what a command line asks help for: an empty text for the common flags; None if it asks for none."""
    at = next((at for at, word in enumerate(arguments) if word in ("-h", "--help")), None)
    if at is None:
        return None
    topic = arguments[at + 1] if at + 1 < len(arguments) else ""
    return "" if topic.startswith("-") else topic


def flags_of(command: Command, method: str | None = None) -> list[FieldDoc]:
    """Returns the flags of a command but for older names, in the order of its dataclasses.

    method: the method that the command takes; None: its own flags.
    """
    docs: dict[str, FieldDoc] = {}
    for place in command.places(method):
        # A name that two dataclasses have is one flag, that of the first.
        docs = {**read_fields(place), **docs}
    launcher = LAUNCHER if command.group == TRAIN else ()
    return [doc for doc in (CONFIG, *docs.values(), *launcher) if not doc.is_older_name]


def help_page(command: Command, topic: str = "", method: str | None = None) -> str:
    """Returns the help of a command, at most WIDTH columns wide.

    topic: "all", a part of flags' names or of a group's title; empty for the common flags.
    method: as in `flags_of`.

    Raises:
        ValueError: no flag or group has the topic in its name.
    """
    docs = flags_of(command, method)
    call = f"trl-fast {command.name}"
    if command.takes_method:
        call += f" {method or 'METHOD'}"
    few = len(docs) <= _FEW
    lines = _usage(call, command.needs)
    if topic in ("", ALL):
        lines += ["", f"{command.help[0].upper()}{command.help[1:]}."]
        lines += ["", *(f"  {example}" for example in command.examples)] if command.examples else []
    chosen = docs if few or topic == ALL else _chosen(docs, topic)
    if few and topic in ("", ALL):
        lines += ["", *_entries(docs, whole=True)]
    else:
        for title, members in grouped(chosen).items():
            lines += ["", f"{title}:", *_entries(members, whole=bool(topic))]
    notes = list(_NOTES)
    if command.takes_method and method is None:
        methods = f"METHOD is one of {', '.join(METHODS)}. {call} --help lists training's flags too."
        notes += textwrap.wrap(methods, WIDTH, break_on_hyphens=False)
    more = {}
    if not few:
        more[f"{call} --help {ALL}"] = f"all {len(docs)} flags"
        more[f"{call} --help WORD"] = "flags with WORD in their name"
    if command.group == TRAIN:
        more[f"trl-fast init {command.name}"] = "a commented YAML file to begin with"
    return "\n".join([*lines, "", *notes, *_table(more)])


def _chosen(docs: list[FieldDoc], topic: str) -> list[FieldDoc]:
    if not topic:
        return [doc for doc in docs if is_common(doc)]
    word = topic.lstrip("-").replace("-", "_").lower()
    titles = {title for title in grouped(docs) if word in title.lower()}
    found = [doc for title, members in grouped(docs).items() for doc in members if title in titles or word in doc.name]
    if not found:
        known = [*(doc.name for doc in docs), *(group.title.lower() for group in GROUPS), ALL]
        raise ValueError(f"--help {topic}: no flag or group has this in its name{did_you_mean(word, known)}")
    return found


def _usage(call: str, needs: str) -> list[str]:
    # A flag and its value stay in one line.
    words = f"usage: {call} {re.sub(' (?!-)', _JOINED, needs)} [FLAGS]"
    lines = textwrap.wrap(words, WIDTH, subsequent_indent=" " * 13, break_on_hyphens=False)
    lines = [line.replace(_JOINED, " ") for line in lines]
    return [*lines, f"       {call} --config FILE.yaml [FLAGS]"] if needs.startswith("--") else lines


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def _entries(docs: Iterable[FieldDoc], *, whole: bool) -> list[str]:
    return [line for doc in docs for line in _entry(doc, whole=whole)]


def _entry(doc: FieldDoc, *, whole: bool) -> list[str]:
    """Returns the lines of one flag: its name and value, and beside them its text and default."""
    name = f"  --{doc.name} {_placeholder(doc)}".rstrip()
    text = " ".join(doc.text.split()) if whole else _short(doc)
    listed = [str(choice) for choice in doc.choices]
    if (whole or len(listed) <= _FEW_CHOICES) and not all(choice in text for choice in listed):
        text = f"{text} One of {', '.join(listed)}."
    silent = any(doc.default is value for value in (UNKNOWN, None, False))
    default = "" if silent else f" [{shown(doc.default)}]"
    lines = textwrap.wrap(f"{text}{default}", WIDTH - _COLUMN, break_on_hyphens=False)
    beside = lines.pop(0) if len(name) < _COLUMN - 1 else ""
    return [f"{name:<{_COLUMN}}{beside}".rstrip(), *(" " * _COLUMN + line for line in lines)]


def _short(doc: FieldDoc) -> str:
    """Returns the summary of a text; of transformers' texts, which have none, the first sentences."""
    if doc.owner != "TrainingArguments":
        return doc.summary
    first, *others = re.split(r"(?<=\.) (?=[A-Z])", doc.summary)
    return f"{first} {others[0]}" if others and len(first) < _FEW_LETTERS else first


def is_switch(doc: FieldDoc) -> bool:
    """Says whether a flag is a truth value that is off unless the flag is given."""
    return doc.annotation in ("bool", "bool | None") and doc.default is False


def _placeholder(doc: FieldDoc) -> str:
    """Returns what stands for a flag's value: nothing for a switch that is off."""
    kinds = {"list": "...", "bool": "BOOL", "dict": "JSON", "int": "N", "float": "X", "Path": "FILE"}
    if is_switch(doc):
        return ""
    if doc.choices:
        return "NAME"
    kind = next((shown for kind, shown in kinds.items() if kind in doc.annotation), "TEXT")
    if kind == "...":
        return next((f"{shown} ..." for kind, shown in kinds.items() if f"list[{kind}" in doc.annotation), "TEXT ...")
    return kind


def shown(value: Any) -> str:
    """Returns a value as a flag or a YAML file would have it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value or '""' if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else repr(value)
