"""Names are the field's words: what the project once called by words of its own stays renamed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support.source_tree import PYTHON_FOLDERS, ROOT, Source, hold, native_files, sources

# A word of ours, and the field's word for it.
PRIVATE_WORDS = {
    "kept_results": "selective_checkpointing",
    "held_memory": "memory_pool",
    "large_tensors": "memory_pool",
    "wide": "upcast",
    "starts": "cu_seqlens",
    "slope": "gradient",
    "slopes": "gradients",
    "weigh": "compute_advantages",
    "look_at": "record_extra",
}
# File names that say nothing about what is in the file.
VAGUE_FILES = ("rows", "blocks", "spans", "products", "answers", "layers", "across", "floor", "sums")
WORD = re.compile(rf"(?<![a-zA-Z0-9])(?:{'|'.join(PRIVATE_WORDS)})(?![a-zA-Z0-9])")


def identifiers(source: Source) -> Iterator[str]:
    """Yields the names that a file defines or uses: variables, attributes, arguments, functions, classes, modules."""
    for node in ast.walk(source.tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name


def test_no_private_words_in_python():
    found = set()
    for source in sources(*PYTHON_FOLDERS, "."):
        # A name that has such a word has it in the text too, which is searched sooner.
        if source.path != "tests/house/test_names.py" and WORD.search(source.text):
            names = {name for name in identifiers(source) if not name.startswith("test_")}
            found |= {f"{source.path} {name}" for name in names if WORD.search(name)}
    hold("private_word", found)


def test_no_private_words_in_cpp():
    found = set()
    for path in native_files():
        names = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"//.*", "", path.read_text(encoding="utf-8"))))
        found |= {f"{path.relative_to(ROOT)} {name}" for name in names if WORD.search(name)}
    hold("private_word_cpp", found)


def test_file_names_explain_themselves():
    paths = [*(ROOT / s.path for s in sources(*PYTHON_FOLDERS)), *native_files()]
    vague = [path for path in paths if path.stem.removeprefix("test_") in VAGUE_FILES or WORD.search(path.stem)]
    hold("file_name", {str(path.relative_to(ROOT)) for path in vague})
