"""Files and functions stay short enough to be read."""

from __future__ import annotations

import ast

from support.source_tree import PYTHON_FOLDERS, ROOT, hold, native_files, sources

FILE_LINES = 500
TRAINER_LINES = 400
FUNCTION_LINES = 60


def test_files():
    lengths = {source.path: source.text.count("\n") for source in sources(*PYTHON_FOLDERS, ".")}
    lengths |= {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in native_files()}
    limits = {path: TRAINER_LINES if path.startswith("trl_fast/trainers/") else FILE_LINES for path in lengths}
    hold("file_length", {path for path, lines in lengths.items() if lines > limits[path]})


def test_functions():
    found = set()
    for source in sources(*PYTHON_FOLDERS, "."):
        for name, node, _ in source.definitions():
            if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:
                found.add(f"{source.path} {name}")
    hold("function_length", found)
