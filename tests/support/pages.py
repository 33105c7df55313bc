"""Reads the documents: fenced blocks of code, the rows of tables, and what a command line in a block says."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

from .source_tree import ROOT, sources

FENCE = re.compile(r'^( *)```(\w+)(?: +title="([^"]+)")?[^\n]*\n(.*?)^\1```', re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Holds a fenced block: the page's path from the root, its language, its title (a file's name) and its text."""

    page: str
    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """Returns the words of each command line, without comments, output and what follows a pipe."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = [shlex.split(line, comments=True) for line in lines]
        return [words[: words.index("|")] if "|" in words else words for words in found if words]


def blocks(*languages: str) -> list[Block]:
    """Returns all blocks of the documents in these languages."""
    pages = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [block for page in pages for block in blocks_of(page) if block.language in languages]


def blocks_of(page: Path) -> list[Block]:
    """Returns the fenced blocks of a page."""
    name = str(page.relative_to(ROOT))
    text = page.read_text(encoding="utf-8")
    return [Block(name, kind, title, textwrap.dedent(body)) for _, kind, title, body in FENCE.findall(text)]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """Returns the cells of each row of the first table below a heading, its two head lines left out."""
    text = page.read_text(encoding="utf-8")
    section = text[re.search(rf"^#+ {re.escape(heading)}$", text, re.M).end() :]
    table = re.search(r"^\|.*?(?=^(?!\|))", section + "\n", re.M | re.S).group()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def in_backticks(cell: str) -> list[str]:
    """Returns what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def message_sources() -> list[str]:
    """Returns the text of every module of the package and of its build, strings over several lines put together."""
    build = [(ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "build_backend.py")]
    texts = [source.text for source in sources("trl_fast")] + build
    return [re.sub(r'"\n\s*f?"', "", text) for text in texts]
