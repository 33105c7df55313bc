"""Talks to a model or an adapter: `trl-fast chat MODEL_OR_ADAPTER_FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_fast.console import make_console
from trl_fast.input_errors import error_line
from trl_fast.settings.choices import one_of

from .arguments import DTYPES
from .positional import parse_with_name

if TYPE_CHECKING:
    from .talker import Talker

_COMMANDS = """\
/reset          forget the conversation
/system TEXT    set the system message, and forget the conversation
/save FILE      write the conversation to a JSONL file, as training reads it
/quit           leave (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass
class ChatArguments:
    """Says how to talk."""

    system: str | None = None
    """System message before the conversation. None: no such message."""

    prompt: str | None = None
    """Ask this one question, print the answer and leave. None: talk."""

    max_new_tokens: int = 512
    """Tokens after which an answer is cut off."""

    temperature: float = 0.7
    """Temperature of sampling; 0: always the likeliest token."""

    top_p: float = 0.95
    """Sample from the likeliest tokens that have this probability together; 1: from all."""

    seed: int | None = None
    """Seed of sampling, for the same answers again. None: other answers each time."""

    dtype: str | None = one_of(DTYPES, default=None)
    """Number format of the weights: auto, bfloat16, float16 or float32.

    None: as they are stored; float32 on a CPU without bfloat16 products.
    """

    base_model: str | None = None
    """Base model of an adapter: a hub name or a folder. None: the one that the adapter names."""

    revision: str | None = None
    """Branch, tag or commit of a hub name. None: its main branch."""

    trust_remote_code: bool = False
    """Allow models and tokenizers that bring Python code of their own."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("temperature", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from {least} on")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number above 0, at most 1")


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Loads the model; returns what talks and gives the exit status."""
    name, parsed = parse_with_name(ChatArguments, arguments, "chat", "MODEL_OR_ADAPTER_FOLDER")
    from transformers import set_seed

    from .talker import AnswerSettings, load_talker

    if parsed.seed is not None:
        set_seed(parsed.seed)
    talker = load_talker(
        name,
        AnswerSettings(parsed.max_new_tokens, parsed.temperature, parsed.top_p),
        base=parsed.base_model,
        dtype=parsed.dtype,
        revision=parsed.revision,
        trust_remote_code=parsed.trust_remote_code,
    )
    talker.reset(parsed.system)
    if parsed.prompt is not None:
        return lambda: Conversation(talker).ask(parsed.prompt)
    return lambda: Conversation(talker).run(name)


class Conversation:
    """Reads what a person types, or lines of a file or pipe, and prints the answers as they are made.

    Only answers go to standard output, all else to standard error. Of a pipe, each line is a turn.
    """

    def __init__(self, talker: Talker) -> None:
        self.talker = talker
        self.notes = make_console(stderr=True, highlight=False)
        self.is_typed = sys.stdin is not None and sys.stdin.isatty()

    def run(self, name: str) -> int:
        """Talks until the input ends, and returns the exit status: 1 if a turn of a pipe has failed, else 0."""
        self.note(f"{name}: {self.talker.description}.")
        if not self.talker.has_template:
            self.note("There is no chat template: what you write is completed as plain text, without a conversation.")
        if self.is_typed:
            self.note("Write a message. /help lists the commands.")
        status = 0
        for line in self._lines():
            text = line.strip("\r\n")
            if text.startswith("/"):
                if not self._command(text):
                    break
            elif text.strip():
                status = max(status, self.ask(text))
        return 0 if self.is_typed else status

    def ask(self, text: str) -> int:
        """Prints the answer to a message, and returns the exit status: 1 where there can be none.

        Ctrl-C ends the answer; what there is of it stays in the conversation.
        """
        try:
            outcome = self.talker.answer(text, lambda piece: print(piece, end="", flush=True))
        except ValueError as error:
            self.notes.print(error_line(error), style="red")
            return 1
        print(flush=True)
        if outcome is not None:
            self.note(f"({outcome})")
        return 0

    def note(self, text: str) -> None:
        """Prints what is no answer."""
        self.notes.print(text, style="dim")

    def _lines(self) -> Iterator[str]:
        """Yields what is typed, or the lines of standard input."""
        if not self.is_typed:
            yield from sys.stdin
            return
        with suppress(ImportError):
            # Lines can be edited, and called up again.
            import readline  # noqa: F401
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print()
                self.note("/quit or Ctrl-D leaves.")
            except EOFError:
                print()
                return

    def _command(self, text: str) -> bool:
        """Does what a line that begins with a slash says; returns whether the talk goes on."""
        word, _, rest = text.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.talker.reset(self.talker.system)
            self.note("The conversation is forgotten.")
        elif word == "/system":
            self.talker.reset(rest or None)
            self.note("A new conversation, with that system message." if rest else "A new one, without a message.")
        elif word == "/save":
            self._save(rest)
        else:
            if word != "/help":
                self.notes.print(f"There is no command {word}.", style="red")
            self.note(_COMMANDS)
        return True

    def _save(self, path: str) -> None:
        if not path:
            self.notes.print("/save needs a file's name, such as /save talk.jsonl", style="red")
            return
        row: dict[str, Any] = {"messages": self.talker.messages}
        try:
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            self.notes.print(f"{path!r} cannot be written: {error_line(error)}", style="red")
            return
        self.note(f"Added to {path}: {len(self.talker.messages)} messages.")
