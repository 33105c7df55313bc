"""Lists the commands of `trl-fast`: the help, and `main`, go by this table. Reading it imports no command."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from trl_fast.trainers.methods import METHODS

TRAIN = "train"
LOOK = "look before you train"
AFTER = "after training"
MACHINE = "machine"
GROUPS = (TRAIN, LOOK, AFTER, MACHINE)
_NOTES = (
    "trl-fast COMMAND --help   what a command does, and its flags",
    "trl-fast --version        the version",
    "trl-fast --debug COMMAND  the traceback of an error that is one line without it",
)


@dataclass(frozen=True)
class Command:
    """Describes one command. Those that are no method of METHODS are `trl_fast.cli.NAME`, with a function `prepare`.

    Args:
        name: what stands after `trl-fast`.
        group: one of GROUPS, under which the help lists it.
        help: what it does, one short line.
    """

    name: str
    group: str
    help: str


_COMMANDS = (
    *(Command(method.name, TRAIN, method.help) for method in METHODS.values()),
    Command("preview", LOOK, "show tokenized examples: what is learned, what is cut"),
    Command("validate", LOOK, "find what is wrong with preference data"),
    Command("plan", LOOK, "estimate the memory of a run, and the longest context that fits"),
    Command("merge", AFTER, "merge an adapter into its model, and save the whole model"),
    Command("chat", AFTER, "talk to a model or an adapter"),
    Command("env", MACHINE, "print versions, the kernels in use, and why others are not"),
    Command("bench", MACHINE, "measure the kernels on this machine"),
    Command("run", MACHINE, "run a script written for TRL, unchanged"),
)

# By name, in the order in which the help shows them.
COMMANDS: Mapping[str, Command] = {command.name: command for command in _COMMANDS}


def usage() -> str:
    """Returns the help text of `trl-fast`, at most 80 columns wide."""
    lines = ["usage: trl-fast COMMAND [ARGUMENTS]"]
    for group in GROUPS:
        listed = [command for command in COMMANDS.values() if command.group == group]
        lines += ["", f"{group}:"] if listed else []
        lines += [line for command in listed for line in _entry(command.name, command.help)]
    lines += ["", *_NOTES]
    return "\n".join(lines)


def _entry(name: str, does: str) -> list[str]:
    """Returns the lines of one entry: its name, and beside it what it does."""
    return textwrap.wrap(f"  {name:<9} {does}", width=80, subsequent_indent=" " * 12)
