"""Tests the tensor heap and the products of several threads under sanitizers: memory, undefined behaviour, races."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from support.instruction_sets import CPU_FLAGS, cpu_has

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "tensor heap": ("tensor_heap_sanitized.cpp", ROOT / "csrc" / "cpu" / "tensor_heap.cpp"),
    **{
        f"products by {isa}": (
            "product_sanitized.cpp",
            f"-DCPU_CAPABILITY={isa.upper()}",
            f"-DCPU_CAPABILITY_{isa.upper()}",
            *(f"-m{flag}" for flag in flags),
        )
        for isa, flags in CPU_FLAGS.items()
        if cpu_has(isa)
    },
}
SANITIZERS = {
    "memory": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "threads": ("-fsanitize=thread",),
}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Compiles a program of this folder, and runs it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    target = folder / "program.out"
    program, *more = arguments
    flags = ["-std=c++20", "-O1", "-g", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, str(Path(__file__).with_name(str(program))), *map(str, more), "-o", str(target)]
    compiled = subprocess.run([*command, "-pthread"], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:4000]
    return subprocess.run([str(target)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("flags", SANITIZERS.values(), ids=SANITIZERS)
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_no_sanitizer_finds_anything(tmp_path, program, flags):
    result = run(tmp_path, *program, *flags)
    assert result.returncode == 0 and result.stdout == "done\n", result.stdout + result.stderr[:4000]
