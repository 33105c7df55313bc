"""Compiles CUDA kernels as host C++."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.host_kernels import HostKernels

ROOT = Path(__file__).parents[2]


def cuda_include() -> Path | None:
    """The toolkit's headers: where nvcc says that it lives, or the usual place."""
    homes = [Path("/usr/local/cuda")]
    if nvcc := shutil.which("nvcc"):
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        homes += [Path(home) for home in re.findall(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)]
    return next((home / "include" for home in homes if (home / "include" / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="session")
def compile_host(tmp_path_factory):
    """compile_host(source, *flags) -> what g++ made of a file of this folder."""
    include = cuda_include()
    if shutil.which("g++") is None or include is None:
        pytest.skip("needs g++ and the CUDA toolkit's headers")
    folder = tmp_path_factory.mktemp("simt")
    flags = ["-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}", "-isystem", str(include)]

    def compile_one(source: str, *more: str) -> Path:
        target = folder / ("_".join([source, *more]).replace("/", "").replace("=", "") + ".out")
        command = ["g++", *flags, *more, str(Path(__file__).with_name(source)), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[:4000]
        return target

    return compile_one


@pytest.fixture(scope="session")
def kernels(compile_host) -> HostKernels:
    return HostKernels(compile_host("row_kernels_simt.cpp", "-shared", "-fPIC"))
