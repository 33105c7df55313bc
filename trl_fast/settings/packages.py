"""Names the packages that some settings need, the extras that bring them, and checks that they are installed."""

from __future__ import annotations

import importlib.util

# The extra of trl-fast that brings a package (pyproject.toml has its versions).
EXTRAS = {"bitsandbytes": "qlora", "deepspeed": "deepspeed", "vllm": "vllm"}


def install_command(package: str) -> str:
    """Returns the command, in backquotes, that installs a package in a version that works."""
    return f"`pip install 'trl-fast[{EXTRAS[package]}]'`" if package in EXTRAS else f"`pip install {package}`"


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
        raise ImportError(f"{setting} needs {package}: {install_command(package)}, or leave it out", name=module)
