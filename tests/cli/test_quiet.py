"""A script that asked for silence gets errors only."""

import logging
import warnings

from trl_fast import init_zero_verbose


def test_warnings_are_dropped_and_errors_shown(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    level = logging.root.level
    try:
        init_zero_verbose()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning("old name", FutureWarning, "script.py", 3)
        logging.error("it failed")
    finally:
        logging.root.setLevel(level)
    shown = capsys.readouterr()
    assert "it failed" in shown.out + shown.err and "old name" not in shown.out + shown.err
