"""Runs the benchmarks of the source tree: `trl-fast bench`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Returns what runs the benchmark that the first argument names; by default `linear_logprob`, that of the head.

    Raises:
        ValueError: this is no source tree, or there is no such benchmark.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "linear_logprob.py").is_file():
        raise ValueError(
            "the benchmarks come with the source tree, not with the installed package; clone the repository and run "
            "`trl-fast bench` from an editable install of it (make venv)"
        )
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else ("linear_logprob", arguments)
    if not (folder / f"{name}.py").is_file():
        raise ValueError(f"there is no benchmark {name!r} in {folder}")

    def run() -> int:
        sys.path.insert(0, str(ROOT))
        sys.argv = [name, *rest]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        return 0

    return run
