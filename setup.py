"""Compiles `trl_fast._C` and writes down, in trl_fast/_build.json, for which torch, and why a part is missing.

Nothing is left out silently. What fails to compile ends the build with one line: the first error and the command that
works. TRL_FAST_PURE=1 asks for the package in plain PyTorch. The CUDA part is compiled where torch is built with CUDA
and a whole toolkit of that version is found; elsewhere Triton's kernels serve a GPU, and `trl-fast env` says so.
TRL_FAST_CUDA=1, or a CUDA_HOME that was set, asks for it: then it is an error that it cannot be built. TRL_FAST_CUDA=0
leaves it out. One kernel of it, for Hopper's GPUs, needs CUTLASS's headers: those of CUTLASS_PATH, or of the package
nvidia-cutlass; without them it is left out. TRL_FAST_NAMED_WHEEL=1 (`make wheel`) puts the torch into the version:
0.1.0+torch2.13.cpu.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from build_backend import (
    PURE,
    asked_for,
    cutlass_flags,
    find_cutlass,
    install_command,
    no_torch,
    requirements,
    stop,
    torch_release,
    why_no_cutlass,
)

ROOT = Path(__file__).parent
# Kernel sources, compiled once per instruction set; the running CPU decides which is called.
ISA_SOURCES = (
    "row_kernels",
    "sparse_kernels",
    "divergence_kernels",
    "layer_kernels",
    "attention_kernels",
    "product_kernels",
)
# Sources for all devices.
COMMON_SOURCES = ("bindings", "layer_autograd", "linear_autograd", "varlen_attention")
# The other sources for the CPU, compiled once.
CPU_SOURCES = (
    "bindings",
    "instruction_sets",
    "layer_bindings",
    "layer_rotation_bindings",
    "attention_bindings",
    "attention_plan",
    "memory_pool",
    "product_bindings",
    "tensor_heap",
)
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
# Kernels of bfloat16 tiles; those with emulated ones, for tests, run anywhere.
TILE_SOURCES = ("attention_bf16_kernels",)
TILE_FLAGS = {
    "EMULATED_AMX": [],
    "AMX": [*ISA_FLAGS["AVX512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DCPU_CAPABILITY_AMX"],
}
# The GPUs that CUDA sources are compiled for, unless TORCH_CUDA_ARCH_LIST asks for others.
CUDA_TARGETS = ("80", "90", "100")
# Sources that serve the instructions of some GPUs only, such as {"name_of_file": ("90a",)}: for these GPUs always.
CUDA_TARGETS_OF_SOURCE: dict[str, tuple[str, ...]] = {"fused_scores_sm90": ("90a",)}
# Those of them that include CUTLASS.
CUTLASS_SOURCES = ("fused_scores_sm90",)
# Without these nothing of CUDA compiles; an nvcc that is a wrapper outside its toolkit has none beside it.
CUDA_HEADERS = ("cuda_runtime.h", "crt/host_config.h")
COMMON_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno"]
# How compilers, linkers and shells begin to say what went wrong.
ERROR_LINE = re.compile(r"\b(error|fatal)\s*:|: not found$|cannot find -l|No such file or directory", re.IGNORECASE)
# Asks for the CUDA part, or for none.
CUDA = "TRL_FAST_CUDA"
NAMED_WHEEL = "TRL_FAST_NAMED_WHEEL"


def compiler() -> str:
    """Returns the command of the C++ compiler."""
    return os.environ.get("CXX", "c++")


def instruction_sets(machine: str) -> list[str]:
    """Returns the instruction sets that are built for a machine architecture."""
    return list(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else ["DEFAULT"]


def tile_sets(machine: str) -> list[str]:
    """Returns the instruction sets for which kernels of tiles are built for a machine architecture."""
    return list(TILE_FLAGS) if machine.lower() in ("x86_64", "amd64") else ["EMULATED_AMX"]


def toolkit_of_nvcc(nvcc: str) -> str | None:
    """Returns the folder of the toolkit that an nvcc belongs to, as it says itself: it may be a wrapper elsewhere."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^#\$ _HERE_=(.+)$", said, re.M)
    return str(Path(found[1].strip()).parent) if found else None


def find_cuda_home() -> str | None:
    """Returns the folder of the CUDA toolkit: CUDA_HOME or CUDA_PATH, that of the nvcc in PATH, else the usual one."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    usual = "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None
    return asked or (toolkit_of_nvcc(nvcc) if nvcc else None) or usual


def toolkit_version(cuda_home: str) -> str:
    """Returns the version of the toolkit in a folder, such as "13.0"; empty if its nvcc does not say it."""
    try:
        said = subprocess.run([str(Path(cuda_home, "bin", "nvcc")), "--version"], capture_output=True, text=True)
    except OSError:
        return ""
    found = re.search(r"release (\d+\.\d+)", said.stdout)
    return found[1] if found else ""


def why_no_cuda(cuda_home: str | None, torch_cuda: str | None, includes: list[str]) -> str:
    """Returns why there will be no CUDA part; empty if nothing is missing.

    A visible GPU is not asked for: machines that build images have none. includes: further folders with headers.
    """
    if os.environ.get(CUDA) == "0":
        return f"{CUDA}=0 was set when it was installed"
    if not torch_cuda:
        return "this torch is built without CUDA"
    if not cuda_home:
        return "no CUDA toolkit was found"
    if not Path(cuda_home, "bin", "nvcc").exists():
        return f"there is no bin/nvcc in {cuda_home}"
    folders = [*includes, *map(str, Path(cuda_home).glob("targets/*/include")), str(Path(cuda_home, "include"))]
    missing = [name for name in CUDA_HEADERS if not any(Path(folder, name).is_file() for folder in folders)]
    if missing:
        return f"there is no include/{missing[0]} in {cuda_home}, where its bin/nvcc is"
    found = toolkit_version(cuda_home)
    if found.split(".")[0] != torch_cuda.split(".")[0]:
        return f"{cuda_home} is a toolkit of CUDA {found or '(unknown)'}, and torch is built with {torch_cuda}"
    return ""


def cuda_is_required() -> bool:
    """Says whether somebody asked for the CUDA part."""
    names = ("CUDA_HOME", "CUDA_PATH") if os.environ.get(CUDA) != "0" else ()
    return asked_for(CUDA) or any(os.environ.get(name) for name in names)


def cuda_sources(root: Path = ROOT) -> list[str]:
    """Returns the CUDA sources that are compiled for every GPU, and their bindings."""
    paths = [path for suffix in ("cu", "cpp") for path in (root / "csrc" / "cuda").glob(f"*.{suffix}")]
    return sorted(str(path.relative_to(root)) for path in paths if path.stem not in CUDA_TARGETS_OF_SOURCE)


def machine_code_flags(targets: Sequence[str]) -> list[str]:
    """Returns nvcc's flags for machine code of these GPUs."""
    return [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]


def cuda_arch_flags(known: str) -> list[str]:
    """Returns flags for machine code of CUDA_TARGETS and PTX of the newest; none where TORCH_CUDA_ARCH_LIST is set.

    known: what `nvcc --list-gpu-arch` prints; older toolkits lack the newer targets.
    """
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return []
    targets = [target for target in CUDA_TARGETS if f"compute_{target}" in known.split()]
    newest = [f"-gencode=arch=compute_{target},code=compute_{target}" for target in targets[-1:]]
    return machine_code_flags(targets) + newest


def compile_for_some_gpus(cuda_home: str, build_dir: Path, cutlass: str | None = None) -> list[str]:
    """Compiles the sources of CUDA_TARGETS_OF_SOURCE, each for its own GPUs; returns their object files.

    torch compiles all sources of an extension with the same flags. cutlass: the folder of its headers; without it,
    sources that need them are left out.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    objects, commands = [], []
    for name, targets in CUDA_TARGETS_OF_SOURCE.items():
        flags = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", *machine_code_flags(targets), f"-I{ROOT / 'csrc'}"]
        if name in CUTLASS_SOURCES:
            if cutlass is None:
                continue
            flags += cutlass_flags(cutlass)
        source, target = ROOT / "csrc" / "cuda" / f"{name}.cu", build_dir / f"{name}.o"
        commands.append([str(Path(cuda_home, "bin", "nvcc")), *flags, "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    run_side_by_side(commands)
    return objects


def run_side_by_side(commands: list[list[str]]) -> None:
    """Runs compilers at the same time; raises RuntimeError with the source of the first that fails."""
    running = [(command, subprocess.Popen(command)) for command in commands]
    codes = [process.wait() for _, process in running]
    for (command, _), code in zip(running, codes, strict=True):
        if code:
            raise RuntimeError(f"{command[0]} failed on {command[-3]}")


def nvcc_flags(cuda_home: str) -> list[str]:
    """Returns the flags of the sources that are compiled for every GPU."""
    nvcc = str(Path(cuda_home, "bin", "nvcc"))
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return ["-O3", *cuda_arch_flags(known)]


def parallel_flags(command: str) -> list[str]:
    """Returns the flag without which at::parallel_for, which lives in a header, is a loop of one thread.

    Nothing is linked: torch has brought the OpenMP library, and with a second one there would be two sets of threads.
    Code of clang would look for functions that GNU's library lacks.
    """
    import torch

    try:
        version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    except OSError:  # no compiler: the build will say so
        return []
    return ["-fopenmp"] if torch.backends.openmp.is_available() and "Free Software Foundation" in version else []


def pip_cuda_includes() -> list[str]:
    """Returns the headers that pip installed with torch: a toolkit need not have all that torch includes."""
    import torch

    return [str(path) for path in sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))]


def make_extension(objects: list[str], cuda_home: str | None, cutlass: str | None = None) -> Extension:
    """Describes the extension, with the CUDA part if a toolkit is given, and of it what needs CUTLASS if that is."""
    from torch.utils import cpp_extension

    # torch takes the folder of the first nvcc in PATH, which may be a wrapper.
    cpp_extension.CUDA_HOME = cuda_home
    sources = [*(f"csrc/{name}.cpp" for name in COMMON_SOURCES), *(f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES)]
    kind = cpp_extension.CUDAExtension if cuda_home else cpp_extension.CppExtension
    cxx_flags = COMMON_FLAGS + parallel_flags(compiler())
    isas = instruction_sets(platform.machine()) + tile_sets(platform.machine())
    parts = [*isas, *(["CUDA"] if cuda_home else []), *(["CUTLASS"] if cuda_home and cutlass else [])]
    macros = [(f"TRL_FAST_HAS_{part}", "1") for part in parts]
    return kind(
        name="trl_fast._C",
        sources=sources + (cuda_sources() if cuda_home else []),
        include_dirs=[str(ROOT / "csrc"), *(pip_cuda_includes() if cuda_home else [])],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags(cuda_home)} if cuda_home else cxx_flags,
        extra_objects=objects,
    )


def compile_instruction_sets(build_dir: Path) -> list[str]:
    """Compiles each kernel source once per instruction set; returns the object files.

    torch compiles all sources of an extension with the same flags.
    """
    import torch
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    build_dir.mkdir(parents=True, exist_ok=True)
    commands, objects = [], []
    parts = [
        *itertools.product(ISA_SOURCES, instruction_sets(platform.machine())),
        *itertools.product(TILE_SOURCES, tile_sets(platform.machine())),
    ]
    for name, isa in parts:
        target = build_dir / f"{name}_{isa}.o"
        flags = [*COMMON_FLAGS, *(ISA_FLAGS | TILE_FLAGS)[isa], f"-DCPU_CAPABILITY={isa}", abi]
        source = str(ROOT / "csrc" / "cpu" / f"{name}.cpp")
        commands.append([compiler(), *flags, f"-I{ROOT / 'csrc'}", *includes, "-c", source, "-o", str(target)])
        objects.append(str(target))
    run_side_by_side(commands)
    return objects


@contextlib.contextmanager
def recorded_output() -> Iterator[list[str]]:
    """Gives a list that has, afterwards, the lines that this process and its compilers printed; prints them then."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as record:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(record.fileno(), 1)
            os.dup2(record.fileno(), 2)
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            record.seek(0)
            lines += record.read().decode(errors="replace").splitlines()
            for line in lines:
                print(line)


def attempt(step: Callable, *arguments: object) -> tuple[Any, str]:
    """Returns a result and why the step failed: the first line that a compiler calls an error, else the exception."""
    result, failure = None, None
    with recorded_output() as lines:
        try:
            result = step(*arguments)
        # ninja's failures are RuntimeError, distutils' its own, a missing compiler OSError.
        except Exception as error:
            failure = error
    if failure is None:
        return result, ""
    if isinstance(failure, FileNotFoundError) and failure.filename == compiler():
        return None, f"there is no C++ compiler {compiler()!r}"
    first = next((line for line in lines if ERROR_LINE.search(line)), f"{type(failure).__name__}: {failure}")
    return None, " ".join(first.split())[:400]


def stop_without_extension(failure: str) -> None:
    """Ends the build where the C++ part fails, with what may work."""
    remedy = "Install g++ (Debian, Ubuntu: `apt-get install g++`) or set CXX to another compiler, then run "
    stop(
        f"the C++ kernels do not compile: {failure}. {remedy}{install_command()}; or {install_command(**{PURE: '1'})} "
        "for plain PyTorch, which is slower."
    )


def stop_without_cuda(failure: str, cuda_home: str | None, torch_cuda: str | None) -> None:
    """Ends the build where the CUDA part was to be built and is not, with what may work."""
    toolkit = f"Set CUDA_HOME to a whole toolkit of CUDA {torch_cuda} (now {cuda_home})"
    remedy = toolkit if torch_cuda else "Install a torch that is built with CUDA"
    stop(
        f"the CUDA kernels are not built: {failure}. {remedy}, then run {install_command()}; or leave them out with "
        f"{install_command(**{CUDA: '0'})}: Triton's kernels then serve the GPU."
    )


class CompileKernels(build_ext):
    """Compiles with torch's BuildExtension, and writes down for which torch and which part is missing."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "trl_fast"
        package.mkdir(parents=True, exist_ok=True)
        # What an earlier build left is not what is installed now.
        for left in ("_build.json", Path(self.get_ext_fullpath("trl_fast._C")).name):
            (package / left).unlink(missing_ok=True)
        if asked_for(PURE):
            self.extensions = []
            record = {"torch": None, "cuda": None, "missing": {"extension": f"{PURE}=1 was set when it was installed"}}
        else:
            record = self.build_parts()
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def build_parts(self) -> dict[str, Any]:
        """Builds what can be built; returns its record, which trl_fast/build_record.py reads.

        Raises:
            SystemExit: there is no torch; or something that is needed or was asked for cannot be built.
        """
        try:
            import torch
        except ImportError:
            no_torch()
        torch_cuda = torch.version.cuda
        cuda_home = find_cuda_home() if torch_cuda else None
        objects, failure = attempt(compile_instruction_sets, Path(self.build_temp).resolve() / "isa")
        if failure:
            stop_without_extension(failure)
        missing = why_no_cuda(cuda_home, torch_cuda, pip_cuda_includes())
        if missing and cuda_is_required():
            stop_without_cuda(missing, cuda_home, torch_cuda)
        _, failure = attempt(self.compile_and_link, objects, None if missing else cuda_home)
        if failure and not missing:
            stop_without_cuda(failure, cuda_home, torch_cuda)
        if failure:
            stop_without_extension(failure)
        if missing:
            return {"torch": torch_release(), "cuda": None, "missing": {"cuda": missing}}
        without_cutlass = why_no_cutlass(find_cutlass())
        left_out = {"cutlass": without_cutlass} if without_cutlass else {}
        return {"torch": torch_release(), "cuda": torch_cuda, "missing": left_out}

    def compile_and_link(self, objects: list[str], cuda_home: str | None) -> None:
        """Builds the extension, with its CUDA part if a toolkit is given."""
        from torch.utils.cpp_extension import BuildExtension

        cutlass = find_cutlass() if cuda_home else None
        if cuda_home:
            objects = objects + compile_for_some_gpus(cuda_home, Path(self.build_temp).resolve() / "cuda", cutlass)
        self.distribution.ext_modules = [make_extension(objects, cuda_home, cutlass)]
        command = BuildExtension(self.distribution, use_ninja=True)
        command.inplace = self.inplace
        command.ensure_finalized()
        command.build_lib = self.build_lib
        command.build_temp = self.build_temp
        command.run()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def compiled_for() -> list[str]:
    """Returns the requirement of the torch that is compiled against; none where nothing is compiled."""
    if asked_for(PURE) or "sdist" in sys.argv:
        return []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return [f"torch=={torch_release()}.*"]
    return []


def version_tag() -> str:
    """Returns what `make wheel` adds to the version: the torch, and its CUDA."""
    if not asked_for(NAMED_WHEEL):
        return ""
    import torch

    return f"+torch{torch_release()}.{'cu' + torch.version.cuda.replace('.', '') if torch.version.cuda else 'cpu'}"


setup(
    packages=[*find_packages(include=["trl_fast", "trl_fast.*"]), "trl_fast.kernels"],
    package_dir={"trl_fast.kernels": "kernels"},
    package_data={
        "trl_fast": ["py.typed", "*.pyi"],
        "trl_fast.cli": ["accelerate_configs/*.yaml"],
        "trl_fast.trainers.run_report": ["templates/*.html"],
    },
    install_requires=[*requirements(), *compiled_for()],
    options={"egg_info": {"tag_build": version_tag()}},
    # What it is made of is known when it is built: torch need not be there for a source distribution.
    ext_modules=[Extension("trl_fast._C", sources=[])],
    cmdclass={"build_ext": CompileKernels},
)
