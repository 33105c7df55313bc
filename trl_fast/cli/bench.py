"""Runs the benchmarks of the source tree: `trl-fast bench`."""

from __future__ import annotations

import ast
import runpy
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from trl_fast.settings.choices import did_you_mean

ROOT = Path(__file__).resolve().parents[2]
# The benchmark that runs where none is named.
HEAD = "linear_logprob"


def benchmarks() -> dict[str, Path]:
    """Returns the file of each benchmark of the source tree by its name; none where this is no source tree."""
    folder = ROOT / "benchmarks"
    files = {path.stem: path for path in sorted(folder.glob("*.py")) if '__name__ == "__main__"' in path.read_text()}
    return files | {path.parent.name: path for path in sorted(folder.glob("*/__main__.py"))}


def usage() -> str:
    """Returns the help text, with what each benchmark does."""
    lines = ["usage: trl-fast bench [NAME] [FLAGS OF THE BENCHMARK]", ""]
    lines += [f"Measures on this machine. Without NAME: {HEAD}.", ""]
    for name, path in benchmarks().items():
        # A package says what it is for in its __init__.
        source = path.with_name("__init__.py") if path.stem == "__main__" else path
        docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        does = docstring.partition("\n\n")[0]
        lines += [f"  {name}", *textwrap.wrap(does, 80, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join([*lines, "", "trl-fast bench NAME --help lists a benchmark's flags."])


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Returns what runs the benchmark that the first argument names; by default that of the loss head.

    Raises:
        ValueError: this is no source tree, or there is no such benchmark.
    """
    known = benchmarks()
    if HEAD not in known:
        raise ValueError(
            "the benchmarks come with the source tree, not with the installed package; in a checkout of the "
            f"repository run `make venv`, then `.venv/bin/trl-fast bench` or `.venv/bin/python -m benchmarks.{HEAD}`"
        )
    if arguments in (["-h"], ["--help"]):
        return _print_usage
    named = bool(arguments) and not arguments[0].startswith("-")
    name, rest = (arguments[0], arguments[1:]) if named else (HEAD, arguments)
    if name not in known:
        raise ValueError(
            f"there is no benchmark {name!r}{did_you_mean(name, known)}; trl-fast bench --help lists them"
        )

    def run() -> int:
        sys.path.insert(0, str(ROOT))
        sys.argv = [name, *rest]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        return 0

    return run


def _print_usage() -> int:
    print(usage())
    return 0
