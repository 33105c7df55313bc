"""Runs a script written for TRL, unchanged, on trl_fast: `trl-fast run`."""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import trl_fast
from trl_fast.console import make_console
from trl_fast.dropin import install_as_trl

USAGE = """usage: trl-fast run [LAUNCHER FLAGS] SCRIPT.py [ARGUMENTS]
       trl-fast run [LAUNCHER FLAGS] -m MODULE [ARGUMENTS]

Runs a script or module in which `import trl` gives trl_fast, whether or not TRL
is installed. Launcher flags are those of `accelerate launch`, such as
--num_processes 2, and --accelerate_config."""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Returns what runs the script.

    Raises:
        ValueError: no script is named, or there is no such file or module.
        ImportError: TRL itself has been imported already.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        return _print_usage
    if not arguments or arguments == ["-m"]:
        raise ValueError("no script is named; write `trl-fast run SCRIPT.py` or `trl-fast run -m MODULE`")
    if arguments[0].startswith("-") and arguments[0] != "-m":
        return _in_several_processes(arguments)
    is_module = arguments[0] == "-m"
    target, *rest = arguments[1:] if is_module else arguments
    if is_module:
        _check_module(target)
    elif not Path(target).is_file():
        raise ValueError(f"there is no script {target!r}")
    install_as_trl()

    def run() -> int:
        # As `python script.py` and `python -m module` do it.
        sys.argv = [target, *rest]
        sys.path.insert(0, os.getcwd() if is_module else str(Path(target).resolve().parent))
        _say_what_runs(target, is_module=is_module)
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
        return 0

    return run


def _say_what_runs(target: str, *, is_module: bool) -> None:
    """Prints, in the main process, which names of a script or module come from trl_fast."""
    if int(os.environ.get("RANK", "0")):
        return
    spec = importlib.util.find_spec(target) if is_module else None
    path = target if spec is None else spec.origin
    names = trl_names(Path(path).read_bytes()) if path and path.endswith(".py") else []
    found = f"; here {', '.join(names)}" if names else ""
    line = f"trl-fast run: `import trl` gives trl_fast {trl_fast.__version__}{found}"
    make_console(stderr=True).print(line, style="dim", highlight=False, soft_wrap=True)


def trl_names(source: bytes) -> list[str]:
    """Returns the names that a script takes from TRL, in their order; none if it cannot be parsed."""
    try:
        nodes = [*ast.walk(ast.parse(source))]
    except (SyntaxError, ValueError):  # Python says where, when the script is run
        return []
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    imports = [node for node in imports if (node.module or "").partition(".")[0] == "trl"]
    return [*dict.fromkeys(alias.name for node in imports for alias in node.names)]


def _check_module(name: str) -> None:
    """Raises ValueError if there is no module of a name, where the command is run or among the packages."""
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    finally:
        sys.path.remove(os.getcwd())
    if not found:
        raise ValueError(f"there is no module {name!r}")


def _print_usage() -> int:
    print(USAGE)
    return 0


def _in_several_processes(arguments: list[str]) -> Callable[[], int]:
    from .launch import check_engine, launch, split_script

    flags, script = split_script(arguments)
    check_engine(flags)
    return lambda: launch(flags, ["run", *script])
