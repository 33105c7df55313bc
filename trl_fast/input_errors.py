"""Tells errors of a user's input from errors of the program, and puts an error into one line."""

from __future__ import annotations

import dis
import re

# Errors that only say that another one, their cause, came up.
_WRAPPERS = ("DatasetGenerationError", "RetryError")
_LONGEST = 600
_RAISE = dis.opmap["RAISE_VARARGS"]


def is_input_error(error: BaseException) -> bool:
    """Says whether an error that comes up before the work begins is one of the user's input.

    Such an error is raised on purpose, by a `raise` statement. Python itself raises TypeError and ValueError where
    code of ours is wrong. A file that cannot be opened and a package that is not installed are the user's too.
    """
    if isinstance(error, OSError):
        return error.filename is not None or is_raised_on_purpose(error)
    if isinstance(error, ImportError):
        return not (error.name or "").startswith("trl_fast")
    return isinstance(error, (ValueError, TypeError, NotImplementedError)) and is_raised_on_purpose(error)


def is_raised_on_purpose(error: BaseException) -> bool:
    """Says whether an error comes from a `raise` statement, and not from an operation that Python refused."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is None or place.tb_frame.f_code.co_code[place.tb_lasti] == _RAISE


def error_line(error: BaseException) -> str:
    """Returns what the telling error of a chain of causes says, in one line."""
    while type(error).__name__ in _WRAPPERS and error.__cause__ is not None:
        error = error.__cause__
    text = one_line(str(error))
    if isinstance(error, KeyError) or not text:
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def one_line(text: str) -> str:
    """Returns a text in one line, and no more of a very long one than its beginning and its end."""
    line = re.sub(r"\s*\n\s*", " ", text.strip())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
