"""Runs `trl-fast COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from trl_fast.trainers.methods import METHODS

# The commands that have a module of their own, and what each does.
_OTHERS = {
    "run": "run a script written for TRL, unchanged",
    "bench": "run a benchmark of the source tree",
    "env": "print versions, backends with reasons, and facts about this machine",
    "plan": "simulate a training step's memory, and the longest context that fits a GPU",
    "validate": "look for what is wrong with preference data",
}
COMMANDS = {**{method.name: method.help for method in METHODS.values()}, **_OTHERS}


def usage() -> str:
    """Returns the help text."""
    lines = ["usage: trl-fast COMMAND [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:9}{does}" for name, does in COMMANDS.items()]
    return "\n".join([*lines, "", "trl-fast COMMAND --help lists a command's arguments."])


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 2, with one message, for bad input or wrong usage, and 1 where the work failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"trl-fast: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        run = _prepare(command, rest)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        from trl_fast.console import make_console

        console = make_console(stderr=True)
        console.print(f"trl-fast {command}: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return run()


def _prepare(command: str, arguments: list[str]) -> Callable[[], int]:
    """Checks a command's arguments; returns what runs it and gives the exit status."""
    if command in METHODS:
        from .training import prepare_training

        return prepare_training(METHODS[command], arguments)
    return importlib.import_module(f"trl_fast.cli.{command}").prepare(arguments)


if __name__ == "__main__":
    sys.exit(main())
