"""Runs one phase in a process of its own: prepares it, waits for its turn, and gives it its device and deadline."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from .facts import Facts


def work(
    name: str, module: str, words: tuple[str, ...], path: Path, device: str, tiny: bool, turn: Connection
) -> None:
    """Runs a module's phase `name`: its `run` gets a Kit and the words; output goes to a log beside the facts.

    turn: gives the deadline, by time.monotonic(), when the phase may begin. Exits with 1 if the phase raised, which is
    among the facts then.
    """
    _to_log(path.with_suffix(".log"))
    facts = Facts(path, name)
    try:
        import torch

        from .phase_context import Kit

        phase = importlib.import_module(module if "." in module else f"benchmarks.gpu_kit.{module}")
        where, given = torch.device(device), [list(words)] if words else []
        if hasattr(phase, "prepare"):
            phase.prepare(where, tiny, *given)
        deadline = turn.recv()
        phase.run(Kit(where, facts, tiny, deadline), *given)
    except EOFError:  # the supervisor is gone
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        facts.skip("phase", error)
        sys.exit(1)


def _to_log(path: Path) -> None:
    """Lets all output of this process, its libraries' and children's too, go to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
