"""The table of commands is true, and `trl-fast` itself answers for help, version and slips of the pen."""

import importlib.util
import subprocess
import sys

import pytest

import trl_fast
from trl_fast.cli.commands import COMMANDS, GROUPS, usage
from trl_fast.cli.main import main
from trl_fast.trainers.methods import METHODS


def test_every_command_has_its_module_and_a_group():
    for name, command in COMMANDS.items():
        assert command.group in GROUPS
        assert name in METHODS or importlib.util.find_spec(f"trl_fast.cli.{name.replace('-', '_')}") is not None


def test_the_help_lists_every_command_in_a_line_and_fits_the_terminal():
    lines = usage().splitlines()
    assert all(f"  {command.name:<12} {command.help}" in lines for command in COMMANDS.values())
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], []])
def test_help_of_all_commands(words, capsys):
    assert main(words) == (0 if words else 2)
    assert capsys.readouterr().out == f"{usage()}\n"


def test_version(capsys):
    for words in (["--version"], ["-V"]):
        assert main(words) == 0
        assert capsys.readouterr().out == f"trl-fast {trl_fast.__version__}\n"


@pytest.mark.parametrize(
    "word, hint",
    [
        ("dop", "; did you mean 'dpo'?"),
        ("--verson", "; did you mean '--version'?"),
        ("--hlep", "; did you mean '--help'?"),
        ("dance", "; trl-fast --help lists the commands"),
    ],
)
def test_an_unknown_command(word, hint, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err == f"trl-fast: unknown command {word!r}{hint}\n"


def test_help_of_a_command(capsys):
    assert main(["help", "env"]) == 0
    asked = capsys.readouterr().out
    assert main(["env", "--help"]) == 0
    assert asked == capsys.readouterr().out and asked.startswith("usage: trl-fast env")
    assert main(["help", "dop"]) == 2
    assert "did you mean 'dpo'?" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "trl_fast", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"trl-fast {trl_fast.__version__}\n")
