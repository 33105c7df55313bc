"""TRL is never imported outside tests and benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys

from support.source_tree import PACKAGE_FOLDERS, ROOT, sources

IMPORT_EVERYTHING = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(json.dumps(sorted(name for name in sys.modules if name.partition(".")[0] == "trl")))
"""


def test_no_file_imports_it():
    for source in sources(*PACKAGE_FOLDERS, "examples"):
        assert "trl" not in {name.partition(".")[0] for name in source.imports()}, source.path


def test_importing_everything_does_not_bring_it():
    names = [source.module for source in sources(*PACKAGE_FOLDERS)]
    command = [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(names)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == []
