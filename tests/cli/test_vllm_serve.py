"""`trl-fast vllm-serve`: the command line is TRL's, and vLLM becomes this process."""

import os
import sys
from types import SimpleNamespace

import pytest
from trl.scripts import vllm_serve as theirs

from support.vllm import install_fake_vllm
from trl_fast.cli import vllm_serve
from trl_fast.cli.main import main


@pytest.fixture
def executed(monkeypatch):
    """Catches the command that the process would become."""
    install_fake_vllm(monkeypatch)
    sys.modules["vllm"].__spec__ = SimpleNamespace()
    found = []
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))
    return found


FLAGS = [
    ["--model", "folder"],
    ["--model", "folder", "--revision", "v1", "--port", "8001", "--max_model_len", "512", "--enforce_eager"],
    ["--model", "folder", "--enable_prefix_caching", "false", "--trust_remote_code", "--tensor_parallel_size", "2"],
    ["--model", "folder", "--enable_prefix_caching", "true", "--swap-space", "8", "--speculative_config", "{}"],
]


@pytest.mark.parametrize("installed", ["0.28.0", "0.31.0"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_command_is_that_of_trl(flags, installed, executed, monkeypatch, capsys):
    monkeypatch.setattr(vllm_serve, "version", lambda name: installed)
    monkeypatch.setattr(theirs, "is_vllm_available", lambda min_version: installed == "0.31.0")
    assert main(["vllm-serve", *flags]) == 0
    ((python, command, environment),) = executed
    parsed, extra = theirs.make_parser().parse_args_and_config(flags, return_remaining_strings=True)
    expected = theirs.build_command(parsed, extra)
    assert python == sys.executable and sorted(command) == sorted(expected)
    assert command[:5] == expected[:5] and command[len(command) - len(extra) :] == extra
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve folder" in capsys.readouterr().err


def test_without_vllm(capsys):
    assert main(["vllm-serve", "--model", "folder"]) == 2
    assert "needs vllm: `pip install 'trl-fast[vllm]'`" in capsys.readouterr().err
