"""Runs `trl-fast COMMAND`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial

import trl_fast
from trl_fast.trainers.methods import METHODS

from .commands import COMMANDS, usage

# The environment variable that stands for --debug.
_DEBUG = "TRL_FAST_DEBUG"

# The exit status after Ctrl-C, as shells have it.
INTERRUPTED = 130
# What may stand in the place of a command.
_HELP = ("-h", "--help", "help")
_VERSION = ("-V", "--version")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 2, with one line, for bad input or wrong usage, and 1 where the work failed. `--debug`, or
    TRL_FAST_DEBUG in the environment, shows the traceback of bad input instead of the line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [arguments[1], "--help", *arguments[2:]]
    if not arguments or arguments[0] in _HELP:
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in _VERSION:
        print(f"trl-fast {trl_fast.__version__}")
        return 0
    arguments, debug = _without_debug(arguments)
    command, *rest = arguments or [""]
    if command not in COMMANDS:
        from trl_fast.settings.choices import did_you_mean

        hint = did_you_mean(command, [*COMMANDS, *_HELP, *_VERSION])
        return _refuse(f"trl-fast: unknown command {command!r}{hint or '; trl-fast --help lists the commands'}")
    try:
        run = _prepare(command, rest)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        from trl_fast.input_errors import error_line, is_input_error

        if debug or not is_input_error(error):
            raise
        # Where there are other processes, who looks after their failures is there already.
        failures = sys.modules.get("trl_fast.parallel.failures")
        if failures is not None:
            failures.tell_failure(error)
        line = f"trl-fast {command}: {error_line(error)}"
        return _refuse(line) if _speaks(error) else 2
    try:
        return run()
    except KeyboardInterrupt:
        if command == "run":  # Python shows where the script was.
            raise
        return INTERRUPTED


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """Takes `--debug` out of a command line; says whether tracebacks are to be shown.

    `--debug` with a value is an argument of training, and after the script of `trl-fast run` it is the script's.
    """
    end = next((at for at, word in enumerate(arguments) if at > 0 and not word.startswith("-")), len(arguments))
    own = [
        at
        for at, word in enumerate(arguments)
        if word == "--debug" and (at + 1 == len(arguments) or arguments[at + 1].startswith("--") or at == 0)
        if at < end or "run" not in arguments[:2]
    ]
    if own:
        # Processes that `accelerate launch` starts see it too.
        os.environ[_DEBUG] = "1"
    return [word for at, word in enumerate(arguments) if at not in own], os.environ.get(_DEBUG, "0") not in ("", "0")


def _speaks(error: Exception) -> bool:
    """Tells whether this process is the one that says what is wrong: the first of a machine; of files and memory all.

    The others of a machine read the same arguments and files, and would all say the same.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, OSError)


def _refuse(message: str) -> int:
    """Prints the line about bad input; returns the exit status."""
    from trl_fast.console import make_console

    make_console(stderr=True).print(message, style="red", highlight=False, soft_wrap=True)
    return 2


def _show(page: str) -> int:
    try:
        print(page, flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _prepare(command: str, arguments: list[str]) -> Callable[[], int]:
    """Checks a command's arguments; returns what runs it and gives the exit status."""
    known = COMMANDS[command]
    if known.arguments:
        from .help_page import help_page, help_topic

        topic = help_topic(arguments)
        if topic is not None:
            method = arguments[0] if known.takes_method and arguments[0] in METHODS else None
            return partial(_show, help_page(known, topic, method))
    if command in METHODS:
        from .training import prepare_training

        return prepare_training(METHODS[command], arguments)
    return importlib.import_module(f"trl_fast.cli.{command.replace('-', '_')}").prepare(arguments)


if __name__ == "__main__":
    sys.exit(main())
