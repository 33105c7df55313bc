"""Keeps the names that scripts for older versions of TRL use, and warns of each in one line."""

from __future__ import annotations

import sys
import warnings
from dataclasses import field
from typing import Any


def deprecated(owner: str, name: str, what: str) -> None:
    """Warns, in one line, of a name of an older TRL; the warning points at the line of the script that uses it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("trl_fast."):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{owner}: `{name}` is a name of an older TRL; {what}", FutureWarning, stacklevel=level)


class OlderName(str):
    """Holds the help text of a field under an older name, and the present field.

    It is a text because argparse gets all of a field's metadata, and knows only `help`.
    """

    what: str
    now: str | None

    def __new__(cls, what: str, now: str | None) -> OlderName:
        text = super().__new__(cls, f"Older name: {what}")
        text.what, text.now = what, now
        return text


def older_name(what: str | None = None, *, now: str | None = None) -> Any:
    """Makes a config field under a name that older scripts use; its value is None unless it is given.

    what: the one line that says so where it is given.
    now: the present field, which takes the value over unless it is set itself.
    """
    return field(default=None, metadata={"help": OlderName(what or f"it works; `{now}` is the present name.", now)})
