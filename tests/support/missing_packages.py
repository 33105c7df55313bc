"""Packages that are installed for tests, as if they were not."""

from __future__ import annotations

import pytest
from transformers import trainer_optimizer

from trl_fast.settings import packages


def hide_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Has trl_fast find none of them, and transformers no bitsandbytes if it is among them."""
    find = packages.importlib.util.find_spec
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name in names else find(name))
    if "bitsandbytes" in names:
        monkeypatch.setattr(trainer_optimizer, "is_bitsandbytes_available", lambda: False)
