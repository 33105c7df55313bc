"""Reads command lines that begin with a name: `trl-fast COMMAND NAME --flag ...`."""

from __future__ import annotations

from typing import Any

from .parser import TrlParser


def parse_with_name(kind: type, arguments: list[str], command: str, name: str) -> tuple[str, Any]:
    """Returns the name that the arguments begin with, and the flags as an object of a dataclass.

    name: what the help calls it.

    Raises:
        ValueError: there is no name, or a flag is unknown or has a bad value.
    """
    prog = f"trl-fast {command}"
    parser = TrlParser(kind, prog=prog, usage=f"{prog} {name} [FLAGS]")
    named = bool(arguments) and not arguments[0].startswith("-")
    # Prints the help and ends the program where it is asked for.
    (parsed,) = parser.parse_args_and_config(arguments[1:] if named else arguments)
    if not named:
        raise ValueError(f"{name} is missing; write {prog} {name} [FLAGS]")
    return arguments[0], parsed
