"""Silences scripts but for errors and warnings."""

from __future__ import annotations

import logging
import warnings

from rich.logging import RichHandler


def init_zero_verbose() -> None:
    """Drops logs below ERROR from here on, and makes warnings logs of level WARNING."""
    logging.basicConfig(format="%(message)s", datefmt="[%X]", handlers=[RichHandler()], level=logging.ERROR)
    warnings.showwarning = _log_warning


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    logging.warning(f"{filename}:{lineno}: {category.__name__}: {message}")
