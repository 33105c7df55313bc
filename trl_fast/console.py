"""Makes consoles and progress bars for the terminal that show any text as it is.

rich reads "[red]" in a text as a style and ":smile:" as a picture, and "[/red]" alone as an error. Names of metrics,
files and models and people's data are none of these.
"""

from __future__ import annotations

import io

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Columns of tables where the output is no terminal.
FILE_WIDTH = 160


def make_console(*, stderr: bool = False, file_width: int | None = None, highlight: bool = True) -> Console:
    """Makes a console that shows text as it is.

    file_width: columns of what goes to a file or a pipe; None for rich's 80. highlight: whether numbers are coloured.
    """
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=highlight)
    if file_width is not None and not console.is_terminal:
        return Console(stderr=stderr, markup=False, emoji=False, highlight=highlight, width=file_width)
    return console


def make_recording_console(width: int) -> Console:
    """Makes a console of so many columns that shows nothing and keeps what is printed, for `export_html`."""
    return Console(record=True, file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)


def progress_columns() -> tuple[ProgressColumn, ...]:
    """Returns the columns of a bar: what is done, how much of it, how long it has taken and will take."""
    description = TextColumn("{task.description}", markup=False)
    return (description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
