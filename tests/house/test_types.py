"""Types are checked by mypy (`make lint`); the modules that it leaves out are an agreed list that only shrinks."""

from __future__ import annotations

import pytest

from support.source_tree import PACKAGE_FOLDERS, ROOT, hold, sources


@pytest.fixture(scope="module")
def mypy() -> dict:
    """Returns mypy's section of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def test_what_is_not_checked_is_agreed(mypy):
    left_out = [rule["module"] for rule in mypy["overrides"] if rule.get("ignore_errors")]
    hold("types", {module for modules in left_out for module in modules})


def test_what_is_not_checked_is_there(mypy):
    names = {source.module for source in sources(*PACKAGE_FOLDERS)}
    for rule in mypy["overrides"]:
        for module in rule["module"] if rule.get("ignore_errors") else []:
            assert module.removesuffix(".*") in names, module


def test_the_whole_package_is_checked_and_its_functions_inside_too(mypy):
    assert mypy["files"] == ["trl_fast"] and mypy["check_untyped_defs"] and not mypy.get("ignore_errors")
    assert not any("follow_imports" in rule or "disable_error_code" in rule for rule in [mypy, *mypy["overrides"]])


def test_no_file_switches_the_check_off():
    for source in sources(*PACKAGE_FOLDERS):
        assert "# mypy: ignore-errors" not in source.text, source.path


def test_the_package_says_that_it_has_types():
    assert (ROOT / "trl_fast" / "py.typed").is_file()
