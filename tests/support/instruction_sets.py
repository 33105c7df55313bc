"""Runs functions with the C++ kernels of each instruction set that they are compiled for."""

from __future__ import annotations

import functools
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

CPU_FLAGS = {
    "default": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
}
# Those that attention in bfloat16 has kernels of its own for.
TILE_FLAGS = {
    "emulated_amx": (),
    "amx": (*CPU_FLAGS["avx512"], "avx512_bf16", "amx_tile", "amx_bf16"),
}


def cpu_has(isa: str) -> bool:
    """Whether this machine runs an instruction set."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return all(flag in flags for flag in (CPU_FLAGS | TILE_FLAGS)[isa])


def check_instruction_set(isa: str, function: Callable[[], None], *, tested_here: bool = False) -> None:
    """Calls a function of a test file in a process whose kernels are those of an instruction set.

    That is this process if they are its own. All tests of this process share the others: each takes seconds to start.
    tested_here: whether other tests make the same calls with the kernels of this process.
    """
    from trl_fast import _C

    assert isa in _C.build_info()["isas"].split(",")
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}: its kernels are compiled here, but not run")
    if _kernels_are_of(isa):
        if tested_here:
            pytest.skip(f"{isa} is this process's own instruction set, whose kernels the other tests have called")
        function()
        return
    process = _process_of(isa)
    process.send(function)
    error = process.recv()
    assert error is None, error[-2000:]


def _kernels_are_of(isa: str) -> bool:
    from trl_fast.ops.backends import load_extension

    return load_extension().reason.endswith(f" {isa}")


@functools.cache
def _process_of(isa: str) -> Connection:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # It ends with this process.
    context.Process(target=_serve, args=(isa, there), daemon=True).start()
    return here


def _serve(isa: str, calls: Connection) -> None:
    """Calls the functions that come, and answers with None or the traceback."""
    os.environ["TRL_FAST_CPU_ISA"] = isa
    while True:
        try:
            function = calls.recv()
            assert _kernels_are_of(isa)
            function()
            calls.send(None)
        except Exception:
            calls.send(traceback.format_exc())
