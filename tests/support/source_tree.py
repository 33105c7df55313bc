"""Reads the repository's own sources once a session, for the tests that hold its structure."""

from __future__ import annotations

import ast
import functools
import gc
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What is installed, and what is read beside it.
PACKAGE_FOLDERS = ("trl_fast", "kernels")
PYTHON_FOLDERS = (*PACKAGE_FOLDERS, "benchmarks", "docs", "examples", "tests")
NATIVE_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True, eq=False)
class Source:
    """Holds one Python file: its path from the root, its import name, its text and its syntax tree."""

    path: str
    module: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """Returns the package that the file's relative imports start from."""
        return self.module if self.path.endswith("__init__.py") else self.module.rpartition(".")[0]

    @property
    def layer(self) -> str:
        """Returns the package or module directly below trl_fast; trl_fast itself for its __init__."""
        return layer_of(self.module)

    @functools.cache  # noqa: B019 - sources live as long as the process
    def imports(self) -> frozenset[str]:
        """Returns the dotted names of everything imported, in functions and under TYPE_CHECKING too.

        A string that is the dotted name of a module of ours counts: tables of lazy imports hold such strings.
        """
        return frozenset(self._imports())

    def _imports(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                yield from (f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_dotted(node.value):
                yield node.value.replace(":", ".")

    @functools.cache  # noqa: B019 - as above
    def definitions(self) -> tuple[tuple[str, Definition, Definition | None], ...]:
        """Returns each function and class with its dotted name, and the definition that it stands in."""
        return tuple(self._definitions())

    def _definitions(self) -> Iterator[tuple[str, Definition, Definition | None]]:
        stack: list[tuple[ast.AST, str, Definition | None]] = [(self.tree, "", None)]
        while stack:
            node, prefix, parent = stack.pop()
            for child in ast.iter_child_nodes(node):
                if isinstance(child, Definition):
                    yield prefix + child.name, child, parent
                    stack.append((child, f"{prefix}{child.name}.", child))
                elif not isinstance(child, ast.expr):  # in which no definition stands
                    stack.append((child, prefix, parent))


def is_dotted(text: str) -> bool:
    """Says whether a string names something below trl_fast: `trl_fast.ops.head`, `trl_fast.ops.head:linear_scores`."""
    head, *rest = text.replace(":", ".").split(".")
    return head == "trl_fast" and bool(rest) and all(part.isidentifier() for part in rest)


def layer_of(module: str) -> str:
    """Returns the layer that a dotted name below trl_fast belongs to; `python -m trl_fast` is the command."""
    module = module.replace("trl_fast.__main__", "trl_fast.cli")
    return (module.split(".") + [module])[1]


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Returns the Python files of folders of the repository (and setup.py where "." is asked for), sorted by path."""
    if len(folders) != 1:
        return tuple(source for folder in folders for source in sources(folder))
    paths = [ROOT / "setup.py"] if folders == (".",) else sorted((ROOT / folders[0]).rglob("*.py"))
    # The collector would go through all trees again and again while they are made, for twice the time of making them.
    gc.disable()
    try:
        return tuple(read(path) for path in paths)
    finally:
        gc.freeze()
        gc.enable()


def read(path: Path) -> Source:
    """Reads and parses one Python file."""
    relative = path.relative_to(ROOT)
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    module = ".".join(["trl_fast", *parts] if parts[0] == "kernels" else parts)
    text = path.read_text(encoding="utf-8")
    return Source(str(relative), module, text, ast.parse(text))


@functools.cache
def native_files() -> tuple[Path, ...]:
    """Returns the C++ and CUDA files, those of the tests too."""
    folders = (ROOT / "csrc", ROOT / "tests")
    return tuple(sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in NATIVE_SUFFIXES))


def hold(rule: str, found: Set[str], details: Mapping[str, str] | None = None) -> None:
    """Compares what breaks a rule with the agreed list of what may break it still; the list only shrinks.

    The list is tests/house/to_shrink.txt: a line is the rule's name, a blank, and what breaks it. details: more to say
    about what breaks the rule.
    """
    lines = (ROOT / "tests" / "house" / "to_shrink.txt").read_text(encoding="utf-8").splitlines()
    agreed = {line.partition(" ")[2] for line in lines if line.partition(" ")[0] == rule}
    new = [f"{key}\n    {details[key]}" if details else key for key in sorted(found - agreed)]
    assert not new, f"{rule}: these break the rule; mend them:\n" + "\n".join(new)
    done = sorted(agreed - found)
    assert not done, f"{rule}: these obey now; delete their lines in tests/house/to_shrink.txt:\n" + "\n".join(done)
