"""Tests the table of the ways to install: docs/install.md shows it, and what it says of a failure is seen."""

from __future__ import annotations

import os
import subprocess

import pytest

from support import install_matrix
from support.install_matrix import CPU_213, GXX, NO_COMPILER, PAGE, PURE, REFUSED, ROWS, STOPS, Row, page_with_table


def test_the_page_shows_the_table():
    text = PAGE.read_text(encoding="utf-8")
    assert page_with_table(text) == text, "run `PYTHONPATH=tests python -m support.install_matrix --write`"
    assert all(f"| `{row.command}` | {row.gives} |" in text for row in ROWS)


def test_the_table_has_every_kind_of_way():
    commands = " ".join(row.command for row in ROWS if row.tested)
    for part in (
        "pip install .",
        "uv pip install .",
        "-e .",
        "--no-build-isolation",
        ".tar.gz",
        ".whl",
        "TRL_FAST_PURE",
    ):
        assert part in commands
    assert {row.environment.python for row in ROWS if row.tested} == {"3.10", "3.11", "3.12", "3.13"}
    assert {"2.11", "2.13"} <= {row.environment.torch for row in ROWS if row.tested}


@pytest.mark.parametrize(
    ("command", "look", "given"),
    [
        ("echo 'trl_fast: no torch. Run `pip install torch`.'; exit 1", "", STOPS),
        ("echo 'trl_fast: no torch.'; exit 1", "", "fails without a word of ours"),
        ("echo error; exit 1", "", "fails without a word of ours"),
        ("true", "echo '[null, null, false, [-2.0794415]]'", PURE),
        ("true", "echo '[\"2.13\", null, true, [-2.0794415]]'", install_matrix.CPU),
        ("true", 'echo \'["2.13", "13.0", true, [-2.0794415]]\'', install_matrix.CUDA),
        ("true", "echo '[\"2.13\", null, false, [-2.0794415]]'", "runs, and is wrong"),
        ("true", "echo '[\"2.13\", null, true, [-1.0]]'", "runs, and is wrong"),
        ("true", "echo 'ImportError: trl_fast is compiled for torch 2.13, and'; exit 1", REFUSED),
        ("true", "echo 'ImportError: undefined symbol'; exit 1", "does not run"),
    ],
)
def test_what_a_row_gives_is_seen(monkeypatch, tmp_path, command, look, given):
    """A stand-in for Python answers as an installed package would."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name, answer in (("python", look), ("trl-fast", "echo 'Verdict: some kernels'")):
        (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
        (programs / name).chmod(0o755)
    seen, line = install_matrix.outcome(Row(CPU_213, GXX, command, ""), tmp_path / "venv", tmp_path)
    assert seen == given and (line or given.startswith("fails"))


def test_a_machine_without_a_compiler_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    variables = install_matrix.environment_variables(tmp_path, NO_COMPILER)
    assert variables["PATH"] == str(tmp_path / "bin") and "CXX" not in variables
    assert os.environ["PATH"] in install_matrix.environment_variables(tmp_path, GXX)["PATH"]
    assert isinstance(install_matrix.shell("exit 3", tmp_path, variables), subprocess.CompletedProcess)
