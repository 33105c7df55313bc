"""Checks a process that has imported everything: TRL is not there, and trainers have few ancestors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.source_tree import PACKAGE_FOLDERS, ROOT, hold, sources

CLASSES_ABOVE_A_TRAINER = 4
IMPORT_EVERYTHING = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import trl_fast
trainers = [getattr(trl_fast, name) for name in trl_fast.__all__ if name.endswith("Trainer")]
ours = {cls.__name__: [c.__name__ for c in cls.__mro__[1:] if c.__module__[:9] == "trl_fast."] for cls in trainers}
print(json.dumps({"trl": sorted(name for name in sys.modules if name.partition(".")[0] == "trl"), "above": ours}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    """Returns what a fresh process tells that has imported every module."""
    names = [source.module for source in sources(*PACKAGE_FOLDERS)]
    command = [sys.executable, "-c", IMPORT_EVERYTHING, json.dumps(names)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_no_file_imports_trl():
    for source in sources(*PACKAGE_FOLDERS, "examples"):
        assert "trl" not in {name.partition(".")[0] for name in source.imports()}, source.path


def test_trl_is_not_imported_at_run_time(imported):
    assert imported["trl"] == []


def test_a_trainer_has_few_classes_of_ours_above_it(imported):
    assert len(imported["above"]) >= 7
    deep = {name: above for name, above in imported["above"].items() if len(above) > CLASSES_ABOVE_A_TRAINER}
    hold("ancestors", deep.keys(), {name: " < ".join(above) for name, above in deep.items()})
