"""Holds what the documentation's site is made of: its list of pages, its pictures, and how it treats links."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

import trl_fast
import trl_fast.ops
from support.source_tree import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    """Lets a test import the site's tools as MkDocs does."""
    monkeypatch.setattr(sys, "path", [str(DOCS / "tools"), *sys.path])


class SettingsLoader(yaml.SafeLoader):
    """Reads mkdocs.yml without making the objects that it names."""


SettingsLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages_of(entry) -> list[str]:
    """Returns the pages that an entry of the navigation lists."""
    if isinstance(entry, str):
        return [entry]
    entries = entry.values() if isinstance(entry, dict) else entry
    return [page for value in entries for page in pages_of(value)]


def test_each_page_is_listed_once():
    import repository_links

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), SettingsLoader)
    there = [str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")]
    assert sorted(pages_of(settings["nav"])) == sorted([*there, *repository_links.ROOT_PAGES.values()])


def test_the_pictures_are_those_that_the_script_draws():
    import pictures

    drawn = {f"{name}.svg": draw().svg() for name, draw in pictures.DRAWINGS.items()}
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert there == drawn, "run python docs/tools/pictures.py"


@pytest.mark.parametrize(
    "document, link, on_site",
    [
        ("docs/architecture.md", "(../CONTRIBUTING.md#tests)", "(contributing.md#tests)"),
        ("docs/grpo.md", "(../benchmarks/results/x.png)", "(repository/benchmarks/results/x.png)"),
        ("docs/api/losses.md", "(../dpo.md)", "(../dpo.md)"),
        ("docs/api/losses.md", "(../../setup.py)", "(../repository/setup.py)"),
        ("CHANGELOG.md", "(docs/gpu-h200.md)", "(gpu-h200.md)"),
        ("docs/sft.md", "(https://example.com/a.md)", "(https://example.com/a.md)"),
        ("docs/sft.md", "(#a)", "(#a)"),
    ],
)
def test_links_are_right_on_the_site(document, link, on_site):
    import repository_links

    assert repository_links.rewritten(document, f"a [text]{link} b") == f"a [text]{on_site} b"


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == trl_fast.__version__


@pytest.mark.parametrize("name", ["bug_report", "question", "feature_request"])
def test_forms_for_issues_ask(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    assert all(re.fullmatch("markdown|textarea|input|dropdown", part["type"]) for part in form["body"])


FAULTY = """<link rel="stylesheet" href="https://fonts.example/a.css"><script src="//cdn.example/b.js"></script>
<h2 id="here">Here</h2><p>A list:
- that is none</p><pre>- but this is meant</pre><p>Fine <code>a
- b</code></p><img src="missing.png"><a href="https://example.com">fine</a> <a href="#here">fine</a>
<a href="#nowhere">x</a><a href="other.html#there">fine</a><a href="other.html#gone">x</a><a href="gone.html">x</a>"""


def test_faults_of_a_built_site_are_seen(tmp_path):
    import site_checks

    (tmp_path / "index.html").write_text(FAULTY, encoding="utf-8")
    (tmp_path / "other.html").write_text('<p id="there">1. of them</p><a href="index.html">fine</a>', encoding="utf-8")
    (tmp_path / "a.css").write_text("a { background: url('https://net.example/a.png') }", encoding="utf-8")
    assert site_checks.faults(tmp_path) == [
        "index.html: comes from the net: https://fonts.example/a.css",
        "index.html: comes from the net: //cdn.example/b.js",
        "index.html: no such anchor: #nowhere",
        "index.html: no such anchor: other.html#gone",
        "index.html: no such file: gone.html",
        "index.html: no such file: missing.png",
        "index.html: markup left as text: 'A list:\\n- that is none'",
        "other.html: markup left as text: '1. of them'",
        "a.css: comes from the net: https://net.example/a.png",
    ]


def test_the_reference_has_each_public_name():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    described = {place.rpartition(".")[2] for place in re.findall(r"^::: (\S+)$", pages, re.M)}
    assert not {*trl_fast.EXPORTS, *trl_fast.ops.__all__} - described - {"BACKENDS"}
