"""Tests the CPU's attention kernels under sanitizers: memory, undefined behaviour, and threads that add in turn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "float32": ("-DCPU_CAPABILITY=DEFAULT",),
    "bfloat16 by emulated tiles": ("-DCPU_CAPABILITY=EMULATED_AMX", "-DTRL_FAST_TILES"),
}


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """Compiles the program with flags, and runs it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = folder / "attention.out"
    sources = [Path(__file__).with_name("attention_sanitized.cpp"), ROOT / "csrc" / "cpu" / "attention_plan.cpp"]
    fixed = ["-std=c++20", "-O1", "-g", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
    command = ["g++", *fixed, f"-I{ROOT / 'csrc'}", *flags, *map(str, sources), "-o", str(target), "-pthread"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:4000]
    return subprocess.run([str(target)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_memory_and_undefined_behaviour(tmp_path, kernels):
    result = run(tmp_path, *kernels, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr[:4000]


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_threads(tmp_path, kernels):
    result = run(tmp_path, *kernels, "-fsanitize=thread")
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr[:4000]


def test_threads_that_do_not_wait_are_found(tmp_path):
    """The test itself: without turns the thread sanitizer has something to say."""
    result = run(tmp_path, *KERNELS["float32"], "-fsanitize=thread", "-DTRL_FAST_PLANT_NO_TURNS")
    assert result.returncode != 0 and "data race" in result.stderr
