"""Tests that the package imports only declared dependencies when it is imported."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the modules that a file imports outside of functions."""
    nodes = [ast.parse(path.read_text())]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def test_every_import_is_declared():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    files = [*(ROOT / "trl_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    names = {name for path in files for name in imported(path)} - sys.stdlib_module_names - {"trl_fast"}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {name for name in names if not {d.lower() for d in distributions.get(name, [])} & declared}
    assert not undeclared
