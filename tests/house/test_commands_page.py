"""Holds the page of commands to the table of commands: each one is there."""

from __future__ import annotations

import re

import pytest

from support.source_tree import ROOT
from trl_fast.cli.commands import COMMANDS, TRAIN


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_a_command_is_on_the_page(command):
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    if command.group == TRAIN:
        assert f"`{command.name}`" in text
    else:
        assert re.search(rf"^## {command.name}$", text, re.M) and f"[{command.name}](#{command.name})" in text
