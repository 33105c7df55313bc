"""Runs a program with the C++ kernels of each instruction set that they are compiled for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CPU_FLAGS = {
    "default": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
}


def cpu_has(isa: str) -> bool:
    """Whether this machine runs an instruction set."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    return all(flag in flags for flag in CPU_FLAGS[isa])


def check_instruction_set(isa: str, test_file: str, function: str) -> None:
    """Calls a function of a test file, `__file__`, in a process whose kernels are those of an instruction set."""
    from trl_fast import _C

    assert isa in _C.build_info()["isas"].split(",")
    if not cpu_has(isa):
        pytest.skip(f"this CPU has no {isa}: its kernels are compiled here, but not run")
    module = Path(test_file)
    program = (
        f"import {module.stem} as t; from trl_fast.ops.backends import load_extension as l; "
        f"assert l().reason.endswith({isa!r}), l(); t.{function}()"
    )
    paths = os.pathsep.join([str(module.parent), *sys.path])
    environment = {**os.environ, "TRL_FAST_CPU_ISA": isa, "PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
