"""Holds the documents to what exists: paths, modules, commands, make targets, links and anchors that they name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from support.source_tree import ROOT

ROOT_DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCUMENTS = [*(ROOT / name for name in ROOT_DOCUMENTS), *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "trl_fast|benchmarks|examples|tests|docs|kernels|csrc|recipes"
# A path from the root; "NAME" and the like stand for anything.
PATH = re.compile(rf"(?<![\w./-])(?:\.\./)?((?:{FOLDERS})/[\w./*-]*\w)(?!\w)")
PLACEHOLDER = re.compile(r"[A-Z]{3,}")
# What a command of ours writes.
WRITTEN = {"benchmarks/results/gpu_facts.jsonl"}
# A dotted name of ours, of a module or of something in one.
DOTTED = re.compile(r"`((?:trl_fast|benchmarks|examples)(?:\.\w+)+)`")
COMMAND = re.compile(r"python -m ([\w.]+)")
TARGET = re.compile(r"\bmake ([a-z][\w-]*)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def exists(path: str) -> bool:
    """Says whether a path from the root, or one that it is a pattern of, exists."""
    return bool(list(ROOT.glob(path))) if "*" in path else (ROOT / path).exists()


def is_module(name: str) -> bool:
    """Says whether a dotted name is that of a module or package below the root."""
    # kernels/ is imported as trl_fast.kernels.
    path = ROOT.joinpath(*name.replace("trl_fast.kernels", "kernels").split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def resolves(name: str) -> bool:
    """Says whether a dotted name is that of a module, or of an attribute in one."""
    parts = name.split(".")
    length = next((n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n]))), 0)
    if length == len(parts) or length == 0:
        return length > 0
    value = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def anchors(document: Path) -> set[str]:
    """Returns the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def unresolved(document: Path) -> list[str]:
    """Returns what a document names and nobody finds."""
    text = document.read_text(encoding="utf-8")
    made = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wrong = [path for path in PATH.findall(text) if not (PLACEHOLDER.search(path) or path in WRITTEN or exists(path))]
    wrong += [name for name in DOTTED.findall(text) if not resolves(name)]
    commands = [name for name in COMMAND.findall(text) if name.startswith(("trl_fast", "benchmarks", "examples"))]
    wrong += [f"python -m {name}" for name in commands if not is_module(name)]
    code = "\n".join(re.findall(r"`[^`]+`|^ {4}.*$|^```.*?^```", text, re.M | re.S))
    wrong += [f"make {target}" for target in TARGET.findall(code) if target not in made]
    for path, anchor in LINK.findall(text):
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"({path}{f'#{anchor}' if anchor else ''})")
    return wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    assert not unresolved(document)


def test_what_does_not_exist_is_seen(tmp_path):
    text = (
        "`trl_fast/data/nothing.py`, `trl_fast.data.nothing`, `python -m benchmarks.nothing`, `make nothing`, "
        "[link](nothing.md), [anchor](#nothing); but not `benchmarks/NAME.json`, `trl_fast/data/*.py`, "
        "`trl_fast.data.Tree`"
    )
    document = tmp_path / "text.md"
    document.write_text(text, encoding="utf-8")
    names = ["trl_fast/data/nothing.py", "trl_fast.data.nothing", "python -m benchmarks.nothing", "make nothing"]
    assert unresolved(document) == [*names, "(nothing.md)", "(#nothing)"]
