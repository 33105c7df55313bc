"""The tests' folders mirror the tree: what a file does is tested in the folder of its name."""

from __future__ import annotations

from support.source_tree import ROOT, hold, sources

# What has tests but no folder of its own: this house, installing, and what tests share.
WITHOUT_A_FOLDER = {"house", "packaging", "support"}
# Modules directly in trl_fast that have a folder of tests.
MODULES = {"rewards"}


def folders(top: str) -> set[str]:
    """Returns the folders with Python files (in tests: test files) below a folder, by their paths from there."""
    files = [ROOT / source.path for source in sources(top)]
    files = [path for path in files if top != "tests" or path.name.startswith("test_")]
    paths = {str(path.parent.relative_to(ROOT / top)) for path in files}
    return paths - {"."}


def test_each_folder_of_tests_is_that_of_a_package():
    tree = folders("trl_fast") | MODULES | {"kernels", "csrc", "benchmarks", "examples", "recipes"}
    hold("mirror", {path for path in folders("tests") if path.partition("/")[0] not in WITHOUT_A_FOLDER} - tree)


def test_each_package_has_a_folder_of_tests():
    packages = {path for path in folders("trl_fast") if "/" not in path}
    hold("untested", packages - folders("tests"))
