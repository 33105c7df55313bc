"""Builds `trl_fast._C`, or says in one line why not.

The C++ extension is an optimisation: without torch at build time, without a compiler, or when anything fails to
compile, the package installs without it and runs in PyTorch. TRL_FAST_REQUIRE_EXT=1 turns that into an error.
"""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Kernel sources, compiled once per instruction set; the running CPU decides which is called.
ISA_SOURCES = ("row_kernels", "sparse_kernels")
ISA_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mfma",
        "-mf16c",
        "-DCPU_CAPABILITY_AVX512",
    ],
}
CUDA_TARGETS = (80, 90, 100)
COMMON_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno"]


def required() -> bool:
    """Whether a missing extension is an error."""
    return os.environ.get("TRL_FAST_REQUIRE_EXT", "0") not in ("", "0")


def give_up(reason: str) -> None:
    """Reports that there will be no extension, in one line; raises if one was required."""
    line = f"trl_fast: the C++ extension is not built ({' '.join(reason.split())[:400]}); everything runs in PyTorch."
    if required():
        raise RuntimeError(line)
    # distutils' log is hidden by pip unless asked for; the terminal is not.
    print(f"WARNING: {line}", flush=True)


def instruction_sets(machine: str) -> list[str]:
    """The instruction sets that are built for a machine architecture."""
    return list(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else ["DEFAULT"]


def cuda_sources(cuda_home: str | None, torch_cuda: str | None, root: Path = ROOT) -> list[str]:
    """The CUDA sources and their bindings, if there are a toolkit and a CUDA build of torch, else none.

    A visible GPU is not asked for: machines that build images have none.
    """
    if not cuda_home or not torch_cuda or not Path(cuda_home, "bin", "nvcc").exists():
        return []
    folder = root / "csrc" / "cuda"
    return sorted(str(path.relative_to(root)) for path in [*folder.glob("*.cu"), *folder.glob("*.cpp")])


def cuda_arch_flags(known: str) -> list[str]:
    """Machine code for CUDA_TARGETS and PTX of the newest, unless TORCH_CUDA_ARCH_LIST asks torch for others.

    known: what `nvcc --list-gpu-arch` prints; older toolkits lack the newer targets.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    targets = [target for target in CUDA_TARGETS if f"compute_{target}" in known.split()]
    flags = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    return flags + [f"-gencode=arch=compute_{target},code=compute_{target}" for target in targets[-1:]]


def nvcc_flags(cuda_home: str) -> list[str]:
    """How the CUDA sources are compiled."""
    nvcc = str(Path(cuda_home, "bin", "nvcc"))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return ["-O3", *cuda_arch_flags(known)]


def parallel_flags(compiler: str) -> list[str]:
    """The flag without which at::parallel_for, which lives in a header, is a loop of one thread.

    Nothing is linked: torch has brought the OpenMP library, and with a second one there would be two sets of threads.
    Code of clang would look for functions that GNU's library lacks.
    """
    import torch

    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:  # no compiler: the build will say so
        return []
    return ["-fopenmp"] if torch.backends.openmp.is_available() and "Free Software Foundation" in version else []


def pip_cuda_includes() -> list[str]:
    """Headers of the CUDA libraries that pip installed with torch: a toolkit need not have all that torch includes."""
    import torch

    return [str(path) for path in sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))]


def find_cuda_home() -> str | None:
    """The CUDA toolkit's folder. torch's own CUDA_HOME is None in a CPU build, which is what we want to tell apart."""
    from torch.utils import cpp_extension

    return cpp_extension.CUDA_HOME


def make_extension():
    """The extension's description. Raises ImportError without torch."""
    import torch
    from torch.utils import cpp_extension

    sources = ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/held_memory.cpp"]
    cuda_home = find_cuda_home()
    cuda = cuda_sources(cuda_home, torch.version.cuda)
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    cxx_flags = COMMON_FLAGS + parallel_flags(os.environ.get("CXX", "c++"))
    isas = instruction_sets(platform.machine())
    macros = [(f"TRL_FAST_HAS_{isa}", "1") for isa in isas] + ([("TRL_FAST_HAS_CUDA", "1")] if cuda else [])
    return kind(
        name="trl_fast._C",
        sources=sources + cuda,
        include_dirs=[str(ROOT / "csrc"), *(pip_cuda_includes() if cuda else [])],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags(cuda_home)} if cuda else cxx_flags,
    )


def compile_instruction_sets(build_dir: Path) -> list[str]:
    """Object files of the kernels, each source one per instruction set: an Extension has only one list of flags."""
    import torch
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    build_dir.mkdir(parents=True, exist_ok=True)
    running, objects = [], []
    for name, isa in itertools.product(ISA_SOURCES, instruction_sets(platform.machine())):
        target = build_dir / f"{name}_{isa}.o"
        flags = [*COMMON_FLAGS, *ISA_FLAGS[isa], f"-DCPU_CAPABILITY={isa}", abi]
        source = str(ROOT / "csrc" / "cpu" / f"{name}.cpp")
        command = [compiler, *flags, f"-I{ROOT / 'csrc'}", *includes, "-c", source, "-o", str(target)]
        running.append((command, subprocess.Popen(command)))
        objects.append(str(target))
    for command, process in running:
        if process.wait():
            raise RuntimeError(f"{command[0]} failed on {command[-3]}")
    return objects


class BuildExtensionOrNot(build_ext):
    """torch's BuildExtension, made to give up politely."""

    def run(self) -> None:
        try:
            from torch.utils.cpp_extension import BuildExtension

            command = BuildExtension(self.distribution, use_ninja=True)
            command.inplace = self.inplace
            command.ensure_finalized()
            command.build_lib = self.build_lib
            command.build_temp = self.build_temp
            for extension in command.extensions:
                extension.extra_objects = compile_instruction_sets(Path(self.build_temp).resolve() / "isa")
            command.run()
        # ninja's failures are RuntimeError, distutils' its own, a missing compiler OSError.
        except Exception as error:
            give_up(f"{type(error).__name__}: {error}")
            self.extensions = []

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def extensions() -> list:
    """What to build; nothing, with a line that says so, when torch is not there."""
    try:
        return [make_extension()]
    except ImportError:
        give_up("torch is not importable here; install it first and use `pip install --no-build-isolation`")
        return []


setup(
    packages=[
        "trl_fast",
        "trl_fast.cli",
        "trl_fast.data",
        "trl_fast.data.validation",
        "trl_fast.dropin",
        "trl_fast.kernels",
        "trl_fast.losses",
        "trl_fast.modeling",
        "trl_fast.ops",
        "trl_fast.planning",
        "trl_fast.rollout",
        "trl_fast.trainers",
    ],
    package_dir={"trl_fast.kernels": "kernels"},
    package_data={"trl_fast.cli": ["accelerate_configs/*.yaml"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensionOrNot},
)
