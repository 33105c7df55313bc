"""Makes the repository's links work on the site: a page's link out of docs/ leads to a copy of the file it names.

The pages are written to be read on GitHub too, so they link to `../CONTRIBUTING.md` or to a picture under
`../benchmarks/`. MkDocs only knows what lies in docs/. This hook (`hooks:` in mkdocs.yml) adds the files that pages
name to the site, and rewrites the links to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Documents at the root of the repository that are pages of the site, and the pages' names.
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)((?:#[^)\s]*)?\))")


def site_path(path: str) -> str:
    """Returns where a file of the repository lies in the site. Both paths begin at their roots."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return ROOT_PAGES.get(path, f"repository/{path}")


def linked_files(document: str, text: str) -> list[str]:
    """Returns the files of the repository that a document links to, as paths from the root."""
    folder = posixpath.dirname(document)
    return [posixpath.normpath(posixpath.join(folder, path)) for _, path, _ in LINK.findall(text)]


def rewritten(document: str, text: str) -> str:
    """Returns a document's text with links that are right on the site. `document` is its path from the root."""
    folder, page_folder = posixpath.dirname(document), posixpath.dirname(site_path(document))

    def on_site(link: re.Match[str]) -> str:
        target = site_path(posixpath.normpath(posixpath.join(folder, link[2])))
        return f"{link[1]}{posixpath.relpath(target, page_folder or '.')}{link[3]}"

    return LINK.sub(on_site, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the root's pages, and every file outside of docs/ that a page links to."""
    documents = [*ROOT_PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {path for name in documents for path in linked_files(name, (ROOT / name).read_text(encoding="utf-8"))}
    for path in sorted({*ROOT_PAGES, *linked}):
        if (ROOT / path).is_file() and not path.startswith("docs/"):
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page."""
    name = {page_name: name for name, page_name in ROOT_PAGES.items()}.get(page.file.src_uri)
    return rewritten(name or f"docs/{page.file.src_uri}", markdown)
