"""Checks that a package which a setting needs is installed."""

from __future__ import annotations

import importlib.util


def check_package(module: str, package: str, setting: str) -> None:
    """Checks that a package is installed.

    Args:
        module: its name in imports.
        package: its name for pip.
        setting: the setting that needs it, with its value, for the message.

    Raises:
        ImportError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{setting} needs {package}: `pip install {package}`, or leave it out", name=module)
