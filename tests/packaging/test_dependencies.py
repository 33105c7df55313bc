"""Tests that requirements.txt has what the package imports, and nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_fast.settings.packages import EXTRAS, install_command

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "trl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]


def imported(path: Path, in_functions: bool) -> Iterator[str]:
    """Yields the top-level names of the modules that a file imports."""
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def packages(in_functions: bool) -> dict[str, set[str]]:
    """Returns each module of others that is imported, with the packages that have it, by their names in lower case."""
    names = {name for path in FILES for name in imported(path, in_functions)} - sys.stdlib_module_names - {"trl_fast"}
    distributions = importlib.metadata.packages_distributions()
    return {name: {found.lower() for found in distributions.get(name, [])} for name in names}


def declared() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.match(r"[\w-]+", line).group().lower() for line in lines if line and not line.startswith("#")}


def test_every_import_is_declared():
    undeclared = {name for name, found in packages(in_functions=False).items() if not found & declared()}
    assert not undeclared


def extras() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_messages_and_documents_name_extras_that_exist():
    files = [*FILES, ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for path in files for name in re.findall(r"trl-fast\[(\w+)\]", path.read_text())}
    assert {"math", "vllm"} <= named <= {*extras()}


def test_an_extra_brings_the_package_that_a_message_names():
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package}\b", line) for line in extras()[extra]), package
        assert install_command(package) == f"`pip install 'trl-fast[{extra}]'`"
    assert install_command("wandb") == "`pip install wandb`"


@pytest.mark.slow
def test_matplotlib_is_imported_where_a_plot_is_drawn():
    """Neither by the package nor by a command: it takes a second, and is large."""
    script = (
        "import importlib, pkgutil, sys, trl_fast;"
        "found = [module.name for module in pkgutil.walk_packages(trl_fast.__path__, 'trl_fast.')];"
        "names = [name for name in found if '._C' not in name];"
        "[importlib.import_module(name) for name in names]; print(len(names), 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split()
    assert int(count) > 100 and loaded == "False"


def test_every_declared_package_is_imported():
    used = {package for found in packages(in_functions=True).values() for package in found}
    assert not {name for name in declared() if name not in used}
