"""Counts how often a call of the head, or a GRPO step, moves from one file of trl_fast to another.

    python -m benchmarks.file_switches

Who reads what happens opens a file at each move: the fewer, the better the code can be followed. A move is a function
of one file that calls a function of another one, or a generator's frame of another file that goes on; returns are not
counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.table import Table

import trl_fast
from trl_fast.ops import linear_logprob

_PACKAGE = Path(trl_fast.__file__).resolve().parent


def file_switches(call: Callable[[], object]) -> list[tuple[str, str, str]]:
    """The moves of a call: file that calls, file that is called (both relative to the package), and its function."""
    known: dict[str, str] = {}
    moves: list[tuple[str, str, str]] = []

    def name_of(frame: FrameType) -> str:
        path = frame.f_code.co_filename
        if path not in known:
            resolved = Path(path)
            inside = resolved.is_absolute() and resolved.resolve().is_relative_to(_PACKAGE)
            known[path] = str(resolved.resolve().relative_to(_PACKAGE)) if inside else ""
        return known[path]

    def see(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not (called := name_of(frame)):
            return
        caller = frame.f_back
        while caller is not None and not name_of(caller):
            caller = caller.f_back
        if caller is not None and name_of(caller) != called:
            moves.append((name_of(caller), called, frame.f_code.co_name))

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return moves


def head_switches() -> dict[str, list[tuple[str, str, str]]]:
    """The moves of one forward and one backward pass of a small trained head with a single tile."""
    torch.manual_seed(0)
    hidden = torch.randn(8, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    targets = torch.randint(32, (8,))
    with torch.autograd.set_multithreading_enabled(False):
        linear_logprob(hidden, weight, targets).logprobs.sum().backward()
        kept: list[torch.Tensor] = []
        forward = file_switches(lambda: kept.append(linear_logprob(hidden, weight, targets).logprobs))
        backward = file_switches(lambda: kept[0].sum().backward())
    return {"head, forward": forward, "head, backward": backward}


def main() -> None:
    """Prints the counts."""
    table = Table("call", "moves", "files")
    found = head_switches()
    for name, moves in found.items():
        table.add_row(name, str(len(moves)), str(len({path for move in moves for path in move[:2]})))
    Console().print(table)


if __name__ == "__main__":
    main()
