"""Tests `trl-fast env`: its verdict over a table of machines, its help, and that it loads no more than it needs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

from trl_fast.cli import verdict as verdict_module
from trl_fast.cli.main import main
from trl_fast.cli.verdict import Machine, read_machine, verdict, verdict_here

LAPTOP = Machine(torch="2.13.0+cpu", isa="avx2", cuda_part="this torch is built without CUDA")
H100 = Machine(torch="2.13.0+cu130", torch_cuda="13.0", gpu="NVIDIA H100 (sm_90)", driver=True, isa="avx512")
NO_TOOLKIT = "no CUDA toolkit was found"
TABLE = [
    (LAPTOP, {}, "CPU kernels (AVX2), no GPU: the fastest there is here."),
    (LAPTOP, {"isa": "avx512"}, "CPU kernels (AVX-512), no GPU: the fastest there is here."),
    (LAPTOP, {"isa": "amx"}, "CPU kernels (AVX-512 and AMX), no GPU: the fastest there is here."),
    (LAPTOP, {"isa": "default"}, "CPU kernels (baseline instructions), no GPU: the fastest there is here."),
    (
        LAPTOP,
        {"isa": None, "extension": "TRL_FAST_PURE=1 was set"},
        "plain PyTorch, without kernels (TRL_FAST_PURE=1 was set): run `build`.",
    ),
    (
        LAPTOP,
        {"driver": True},
        "CPU kernels (AVX2), and the NVIDIA GPU is not used: torch 2.13.0+cpu is built for CPUs. Run `pip install "
        "--force-reinstall torch`, then `build`.",
    ),
    (
        H100,
        {"gpu": None},
        "CPU kernels (AVX-512), and the NVIDIA GPU is not used: torch 2.13.0+cu130 cannot reach it; `nvidia-smi` must "
        "show a driver for CUDA 13.0 or newer.",
    ),
    (H100, {"gpu": None, "driver": False}, "CPU kernels (AVX-512), no GPU: the fastest there is here."),
    (H100, {}, "CUDA and Triton kernels on NVIDIA H100 (sm_90): the fastest there is here."),
    (H100, {"triton": False}, "CUDA kernels on NVIDIA H100 (sm_90): the fastest there is here."),
    (
        H100,
        {"cuda_part": NO_TOOLKIT},
        "Triton kernels only on NVIDIA H100 (sm_90); the CUDA part is not built (no CUDA toolkit was found): run "
        "`CUDA_HOME=/path/to/cuda-13.0 build`.",
    ),
    (
        H100,
        {"isa": None, "extension": "TRL_FAST_PURE=1 was set", "cuda_part": "no build is on record here"},
        "Triton kernels only on NVIDIA H100 (sm_90); the CUDA part is not built (TRL_FAST_PURE=1 was set): run "
        "`CUDA_HOME=/path/to/cuda-13.0 build`.",
    ),
    (
        H100,
        {"cuda_part": NO_TOOLKIT, "triton": False},
        "plain PyTorch on NVIDIA H100 (sm_90), without kernels (no CUDA toolkit was found): run `pip install triton`, "
        "then `CUDA_HOME=/path/to/cuda-13.0 build`.",
    ),
    (
        H100,
        {"unusable": "compiled for torch 2.10: run `build`", "isa": None},
        "no kernels: compiled for torch 2.10: run `build`.",
    ),
]


def build(**variables: str) -> str:
    return f"`{' '.join([*(f'{name}={value}' for name, value in variables.items()), 'build'])}`"


@pytest.mark.parametrize(("machine", "changed", "line"), TABLE)
def test_the_verdict_names_the_kernels_and_the_command_for_better_ones(machine, changed, line):
    assert verdict(dataclasses.replace(machine, **changed), build) == line


def test_the_last_line_is_the_verdict_of_this_machine(capsys, monkeypatch):
    assert main(["env"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Verdict: {verdict_here()}"
    monkeypatch.setattr(verdict_module, "read_machine", lambda: H100)
    assert main(["env"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Verdict: CUDA and Triton kernels on NVIDIA H100")


def test_the_facts_of_this_machine():
    import torch

    from trl_fast.ops.backends import load_extension

    machine = read_machine()
    assert machine.torch == torch.__version__ and bool(machine.isa) == load_extension().ok
    assert bool(machine.gpu) == torch.cuda.is_available()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_the_command_prints(flag, capsys):
    assert main(["env", flag]) == 0
    assert "usage: trl-fast env" in capsys.readouterr().out


def test_arguments_are_refused(capsys):
    assert main(["env", "--all"]) == 2
    assert "trl-fast env takes no arguments, got --all" in capsys.readouterr().err


def test_env_loads_neither_transformers_nor_the_compiler_of_torch():
    script = "import sys; from trl_fast.cli.main import main; main(['env']);"
    script += "print([n for n in ('transformers', 'torch._dynamo', 'datasets', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
