"""Checks the built site: nothing in it comes from the net, no link is broken, no markup is left as text.

A hook of MkDocs (`hooks:` in mkdocs.yml): a fault ends the build, and the message names page and fault.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//")
# What a browser fetches by itself, and the attributes that name it. Links (<a>) are followed by people only.
FETCHED = {"script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",)}
FETCHED_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}
# A line of Markdown that a reader of the page sees as it is: a list without an empty line before it, a table, a fence.
LEFT_OVER = re.compile(r"^(?:[-*+] |\d+\. |\|.*\||```|::: |#+ )", re.M)
# The text of these is meant as it is.
VERBATIM = {"pre", "code", "script", "style", "svg", "textarea"}


@dataclass
class ReadPage(HTMLParser):
    """Collects of one page: its anchors, the links that people follow, what a browser fetches, and its paragraphs."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    open_verbatim: int = 0
    in_paragraph: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Reads a tag's anchor, links and files."""
        values = {name: value for name, value in attributes if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and FETCHED_LINKS & set(values.get("rel", "").split()):
            self.fetched.append(values.get("href", ""))
        self.fetched += [values[name] for name in FETCHED.get(tag, ()) if name in values]
        self.open_verbatim += tag in VERBATIM
        if tag in ("p", "li", "td"):
            self.in_paragraph = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        """Ends a paragraph, or a part whose text is meant as it is."""
        self.open_verbatim -= tag in VERBATIM
        if tag in ("p", "li", "td"):
            self.in_paragraph = False

    def handle_data(self, data: str) -> None:
        """Adds text to the paragraph that it is in."""
        if self.in_paragraph and not self.open_verbatim:
            self.paragraphs[-1] += data


def read_page(path: Path) -> ReadPage:
    """Reads a page."""
    page = ReadPage()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def broken_links(name: str, page: ReadPage, pages: dict[str, ReadPage], files: set[str]) -> list[str]:
    """Returns the links of a page that lead to no file or to no anchor in the site."""
    broken = []
    for link in [*page.links, *page.fetched]:
        if ADDRESS.match(link) or re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        path = path.partition("?")[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        target = posixpath.join(target, "index.html") if f"{target}/index.html" in files else target
        target = "index.html" if target == "." else target
        if target not in files:
            broken.append(f"{name}: no such file: {link}")
        elif anchor and target in pages and anchor not in pages[target].anchors:
            broken.append(f"{name}: no such anchor: {link}")
    return broken


def faults(site: Path) -> list[str]:
    """Returns what is wrong with a built site, a line each."""
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    # The theme's page for addresses that are not found is served at any depth: its links are absolute.
    pages = {name: read_page(site / name) for name in files if name.endswith(".html") and name != "404.html"}
    found = []
    for name, page in sorted(pages.items()):
        found += [f"{name}: comes from the net: {address}" for address in page.fetched if ADDRESS.match(address)]
        found += broken_links(name, page, pages, files)
        found += [f"{name}: markup left as text: {text[:80]!r}" for text in page.paragraphs if LEFT_OVER.search(text)]
    for name in sorted(files):
        if name.endswith(".css"):
            text = (site / name).read_text(encoding="utf-8")
            found += [
                f"{name}: comes from the net: {url}"
                for url in re.findall(r"url\([\"']?((?:https?:)?//[^)\"']+)", text)
            ]
    return found


def on_post_build(config: MkDocsConfig) -> None:
    """Ends the build with what is wrong with the site."""
    if found := faults(Path(config.site_dir)):
        raise PluginError("\n".join(["the site has faults:", *found]))
