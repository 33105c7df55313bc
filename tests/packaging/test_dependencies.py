"""Tests that requirements.txt has what the package imports, and nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_every_declared_package_is_imported():
    used = {package for found in packages(in_functions=True).values() for package in found}
    assert not {name for name in declared() if name not in used}
