"""Says in one line which kernels serve this machine, and which command brings better ones."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# How people write the instruction sets that the extension's kernels are compiled for.
INSTRUCTION_SETS = {"amx": "AVX-512 and AMX", "avx512": "AVX-512", "avx2": "AVX2", "default": "baseline instructions"}
BEST = "the fastest there is here."
# Where a driver of NVIDIA shows its GPUs, also inside containers, under Linux and in WSL.
DRIVER_FILES = ("/dev/nvidia0", "/dev/dxg")


@dataclass(frozen=True)
class Machine:
    """Holds the facts that decide which kernels run.

    - `torch`, `torch_cuda`: torch's version, and the CUDA that it was built with.
    - `gpu`: the name of the first CUDA device that torch sees, with its capability; None: it sees none.
    - `driver`: whether a driver for NVIDIA GPUs is there.
    - `isa`: the instruction set that the compiled CPU kernels use; None: they are not there.
    - `extension`, `cuda_part`: empty where the compiled extension and its CUDA part serve, else why they do not.
    - `unusable`: why an extension that is installed is refused, with the command that mends it.
    - `triton`: whether Triton is installed.
    """

    torch: str
    torch_cuda: str | None = None
    gpu: str | None = None
    driver: bool = False
    isa: str | None = None
    extension: str = ""
    cuda_part: str = ""
    unusable: str = ""
    triton: bool = True


def verdict(machine: Machine, build: Callable[..., str]) -> str:
    """Returns the line about a machine.

    build: returns the command, in backquotes, that compiles the package again, with the variables that it is given.
    """
    if machine.unusable:
        return f"no kernels: {machine.unusable}."
    if machine.gpu:
        return _on_gpu(machine, build)
    if not machine.isa:
        return f"plain PyTorch, without kernels ({machine.extension}): run {build()}."
    cpu = f"CPU kernels ({INSTRUCTION_SETS.get(machine.isa, machine.isa)})"
    if not machine.driver:
        return f"{cpu}, no GPU: {BEST}"
    if machine.torch_cuda:
        return (
            f"{cpu}, and the NVIDIA GPU is not used: torch {machine.torch} cannot reach it; `nvidia-smi` must show a "
            f"driver for CUDA {machine.torch_cuda} or newer."
        )
    return (
        f"{cpu}, and the NVIDIA GPU is not used: torch {machine.torch} is built for CPUs. Run `pip install "
        f"--force-reinstall torch`, then {build()}."
    )


def _on_gpu(machine: Machine, build: Callable[..., str]) -> str:
    """Returns the line about a machine with a GPU."""
    again = build(CUDA_HOME=f"/path/to/cuda-{machine.torch_cuda}")
    reason = machine.cuda_part if machine.isa else machine.extension
    if not machine.cuda_part and machine.isa:
        kernels = "CUDA and Triton kernels" if machine.triton else "CUDA kernels"
        return f"{kernels} on {machine.gpu}: {BEST}"
    if machine.triton:
        return f"Triton kernels only on {machine.gpu}; the CUDA part is not built ({reason}): run {again}."
    return f"plain PyTorch on {machine.gpu}, without kernels ({reason}): run `pip install triton`, then {again}."


def read_machine() -> Machine:
    """Reads the facts of this machine."""
    import torch

    from trl_fast.build_record import read_build_record
    from trl_fast.ops.backends import extension_is_unusable, load_extension

    record, isa, gpu = read_build_record(), None, None
    if load_extension().ok:
        from trl_fast import _C

        isa = _C.build_info()["isa"]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name} (sm_{properties.major}{properties.minor})"
    return Machine(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpu=gpu,
        driver=any(Path(place).exists() for place in DRIVER_FILES),
        isa=isa,
        extension="" if isa else record.why_missing("extension"),
        cuda_part="" if record.cuda else record.why_missing("cuda"),
        unusable=extension_is_unusable(),
        triton=importlib.util.find_spec("triton") is not None,
    )


def verdict_here() -> str:
    """Returns the line about this machine."""
    from trl_fast.build_record import build_again, read_installation

    return verdict(read_machine(), functools.partial(build_again, read_installation()))
