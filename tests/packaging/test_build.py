"""Tests what setup.py builds and says where something is missing or fails, with stand-ins for the compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

import build_backend

ROOT = Path(__file__).parents[2]
# Writes what is asked for with -o, after `failure`; answers questions about itself.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
  --list-gpu-arch) echo compute_90; exit 0 ;;
  --dryrun) echo '#$ _HERE_={cuda_home}/bin' >&2; exit 0 ;;
  -dump*) echo 12.2.0; exit 0 ;;
esac
{failure}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
NVCC_FAILS = "echo 'row_kernels.cu(7): error: no instance matches' >&2; echo '1 error detected' >&2; exit 2"
GCC_FAILS = "echo \"vec.h:9:1: error: 'hypot' was not declared in this scope\" >&2; exit 1"
RELEASE = ".".join(torch.__version__.split(".")[:2])
WHOLE = {"torch": RELEASE, "cuda": "13.0", "missing": {}}


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("trl_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(setup_module, monkeypatch, tmp_path):
    """A machine with a CUDA build of torch, a whole toolkit and a C++ compiler, and `build()` on it."""
    cuda_home, log = tmp_path / "cuda", tmp_path / "commands.txt"

    def install(path: Path, failure: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMPILER.format(log=shlex.quote(str(log)), failure=failure, cuda_home=cuda_home))
        path.chmod(0o755)

    install(cuda_home / "bin" / "nvcc")
    # The nvcc in PATH is a wrapper outside of its toolkit.
    install(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    install(tmp_path / "gcc")
    for name in setup_module.CUDA_HEADERS:
        (cuda_home / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (cuda_home / "include" / name).touch()
    header = tmp_path / "cutlass" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "cutlass"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    # What pip has brought for a CUDA build of torch, where these tests run in one.
    monkeypatch.setattr(setup_module, "pip_cuda_includes", list)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "gcc"))
    monkeypatch.setenv("LDSHARED", f"{tmp_path / 'gcc'} -shared")
    for name in ("TRL_FAST_CUDA", "TRL_FAST_PURE", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def build() -> dict[str, Any]:
        distribution = Distribution({"name": "trl_fast", "ext_modules": [Extension("trl_fast._C", sources=[])]})
        command = setup_module.CompileKernels(distribution)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        return json.loads((tmp_path / "lib" / "trl_fast" / "_build.json").read_text())

    def built() -> bool:
        return bool(list((tmp_path / "lib" / "trl_fast").glob("_C.*.so")))

    def recorded() -> bool:
        return (tmp_path / "lib" / "trl_fast" / "_build.json").exists()

    def commands() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    return SimpleNamespace(
        build=build,
        built=built,
        recorded=recorded,
        commands=commands,
        install=install,
        cuda_home=cuda_home,
        gcc=tmp_path / "gcc",
    )


def test_a_whole_toolkit_gives_both_parts(machine):
    assert machine.build() == WHOLE and machine.built()
    assert any("row_kernels.cu" in line for line in machine.commands())
    assert any("bindings.cpp" in line and "-DTRL_FAST_HAS_CUDA=1" in line for line in machine.commands())


def targets_of(commands: list[str], source: str) -> set[str]:
    """Returns the GPUs that a source was compiled for, by the commands that compiled it."""
    lines = [line for line in commands if source in line and " -c " in line]
    assert lines
    return {code for line in lines for code in re.findall(r",code=(\w+)", line)}


@pytest.mark.parametrize(("asked", "others"), [(None, {"sm_90", "compute_90"}), ("8.0", {"sm_80"})])
def test_a_source_is_compiled_for_its_own_gpus(machine, setup_module, monkeypatch, asked, others):
    if asked:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(setup_module, "CUDA_TARGETS_OF_SOURCE", {"row_kernels": ("90a",)})
    assert machine.build() == WHOLE and machine.built()
    assert targets_of(machine.commands(), "cuda/row_kernels.cu") == {"sm_90a"}
    assert targets_of(machine.commands(), "cuda/loss_kernels.cu") == others
    (link,) = [line for line in machine.commands() if "-shared" in line]
    assert link.count("cuda/row_kernels.o") == 1 and link.count("cuda/loss_kernels.o") == 1


def of_cutlass(machine) -> tuple[list[str], list[str], list[str]]:
    """Returns the commands that compile its source, its bindings, and that link it."""
    commands = machine.commands()
    compiled = [line for line in commands if "cuda/fused_scores_sm90.cu" in line]
    bindings = [line for line in commands if "cuda/fused_scores_bindings.cpp" in line and " -c " in line]
    linked = [line for line in commands if "-shared" in line and "cuda/fused_scores_sm90.o" in line]
    assert len(bindings) == 1
    return compiled, bindings, linked


def test_what_needs_cutlass_is_built_with_its_headers(machine, tmp_path):
    assert machine.build() == WHOLE
    (compiled,), (bindings,), (linked,) = of_cutlass(machine)
    assert f"-isystem={tmp_path / 'cutlass' / 'include'}" in compiled and "-DNDEBUG" in compiled
    assert targets_of([compiled], "fused_scores_sm90.cu") == {"sm_90a"}
    assert "-DTRL_FAST_HAS_CUTLASS=1" in bindings


def test_without_the_headers_of_cutlass_the_rest_is_built_and_it_is_on_record(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    reason = f"there is no cutlass/cutlass.h in CUTLASS_PATH={tmp_path}"
    assert machine.build() == {**WHOLE, "missing": {"cutlass": reason}} and machine.built()
    compiled, (bindings,), linked = of_cutlass(machine)
    assert compiled == linked == [] and "TRL_FAST_HAS_CUTLASS" not in bindings


def test_cutlass_is_found_where_pip_put_it(monkeypatch, tmp_path):
    monkeypatch.delenv("CUTLASS_PATH", raising=False)
    header = tmp_path / "cutlass_library" / "source" / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    about = tmp_path / "nvidia_cutlass-4.2.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cutlass\nVersion: 4.2.0.0\n")
    (about / "RECORD").write_text(f"{header.relative_to(tmp_path)},,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert build_backend.find_cutlass() == str(header.parents[1])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    assert build_backend.find_cutlass() is None
    assert "pip install nvidia-cutlass" in build_backend.why_no_cutlass(None)


def test_a_source_that_fails_for_its_own_gpus_ends_the_build(machine, setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "CUDA_TARGETS_OF_SOURCE", {"row_kernels": ("90a",)})
    machine.install(machine.cuda_home / "bin" / "nvcc", NVCC_FAILS)
    assert "row_kernels.cu(7): error: no instance matches" in refusal(machine)


def refusal(machine) -> str:
    """Returns the line that a build ends with; nothing of it is left then."""
    with pytest.raises(SystemExit) as caught:
        machine.build()
    assert not machine.built() and not machine.recorded(), "what an earlier build left would be taken for this one"
    line = str(caught.value)
    assert line.startswith("trl_fast: ") and "\n" not in line
    return line


def test_nvcc_compiles_a_source_for_one_gpu_alone(setup_module, monkeypatch, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source = tmp_path / "csrc" / "cuda" / "tiny.cu"
    source.parent.mkdir(parents=True)
    source.write_text(
        "#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)\n#error not for this GPU\n#endif\n"
        "__global__ void tiny(float* x) { *x = 1; }\n"
    )
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    monkeypatch.setattr(setup_module, "CUDA_TARGETS_OF_SOURCE", {"tiny": ("90a",)})
    home = str(Path(nvcc).parents[1])
    (made,) = setup_module.compile_for_some_gpus(home, tmp_path / "objects")
    assert Path(made).stat().st_size > 0
    monkeypatch.setattr(setup_module, "CUDA_TARGETS_OF_SOURCE", {"tiny": ("90",)})
    with pytest.raises(RuntimeError, match="nvcc failed on .*tiny.cu"):
        setup_module.compile_for_some_gpus(home, tmp_path / "objects")


def test_an_nvcc_that_fails_ends_the_build_with_both_ways_on(machine):
    machine.install(machine.cuda_home / "bin" / "nvcc", NVCC_FAILS)
    assert refusal(machine) == (
        "trl_fast: the CUDA kernels are not built: row_kernels.cu(7): error: no instance matches. Set CUDA_HOME to a "
        f"whole toolkit of CUDA 13.0 (now {machine.cuda_home}), then run `pip install .`; or leave them out with "
        "`TRL_FAST_CUDA=0 pip install .`: Triton's kernels then serve the GPU."
    )


def no_cuda(reason: str) -> dict[str, Any]:
    return {"torch": RELEASE, "cuda": None, "missing": {"cuda": reason}}


def test_the_cuda_part_is_left_out_on_request(machine, monkeypatch):
    monkeypatch.setenv("TRL_FAST_CUDA", "0")
    monkeypatch.setenv("CUDA_HOME", str(machine.cuda_home))
    assert machine.build() == no_cuda("TRL_FAST_CUDA=0 was set when it was installed") and machine.built()
    assert not any(".cu" in line or "-DTRL_FAST_HAS_CUDA" in line for line in machine.commands())


@pytest.mark.parametrize("name", ["cuda_runtime.h", "crt/host_config.h"])
def test_a_toolkit_without_headers_is_not_tried(machine, name, monkeypatch):
    (machine.cuda_home / "include" / name).unlink()
    reason = f"there is no include/{name} in {machine.cuda_home}, where its bin/nvcc is"
    assert machine.build() == no_cuda(reason) and machine.built()
    assert not any(".cu" in line for line in machine.commands())
    monkeypatch.setenv("TRL_FAST_CUDA", "1")
    assert f"the CUDA kernels are not built: {reason}. Set CUDA_HOME to a whole" in refusal(machine)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_toolkit_that_was_named_and_is_none_is_an_error(machine, monkeypatch, variable):
    monkeypatch.setenv(variable, "/no/such/cuda")
    assert "there is no bin/nvcc in /no/such/cuda. Set CUDA_HOME" in refusal(machine)


def test_a_toolkit_of_another_cuda_is_as_good_as_none(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    reason = f"{machine.cuda_home} is a toolkit of CUDA 13.0, and torch is built with 12.8"
    assert machine.build() == no_cuda(reason) and machine.built()


def test_an_nvcc_that_says_nothing_of_its_toolkit_is_no_toolkit(setup_module, machine):
    assert setup_module.toolkit_of_nvcc(str(machine.cuda_home / "bin" / "nvcc")) == str(machine.cuda_home)
    machine.install(machine.cuda_home / "bin" / "nvcc", "exit 1")
    assert setup_module.toolkit_version(str(machine.cuda_home)) == "13.0"
    for nothing in ("/bin/true", "/no/such/nvcc"):
        assert setup_module.toolkit_of_nvcc(nothing) is None
    assert setup_module.toolkit_version("/no/such/cuda") == ""


def test_headers_may_lie_where_conda_or_pip_put_them(machine, setup_module, monkeypatch, tmp_path):
    runtime, host = (machine.cuda_home / "include" / name for name in setup_module.CUDA_HEADERS)
    (machine.cuda_home / "targets" / "x86_64-linux" / "include" / "crt").mkdir(parents=True)
    host.rename(machine.cuda_home / "targets" / "x86_64-linux" / "include" / "crt" / "host_config.h")
    (tmp_path / "pip").mkdir()
    runtime.rename(tmp_path / "pip" / "cuda_runtime.h")
    assert "cuda_runtime.h" in machine.build()["missing"]["cuda"]
    monkeypatch.setattr(setup_module, "pip_cuda_includes", lambda: [str(tmp_path / "pip")])
    assert machine.build() == WHOLE


def test_a_cpu_build_of_torch_is_no_fault(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.build() == no_cuda("this torch is built without CUDA") and machine.built()
    monkeypatch.setenv("TRL_FAST_CUDA", "1")
    assert "this torch is built without CUDA. Install a torch that is built with CUDA, then" in refusal(machine)


def test_no_toolkit_is_no_fault_either_but_written_down(machine, setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "find_cuda_home", lambda: None)
    assert machine.build() == no_cuda("no CUDA toolkit was found") and machine.built()


def test_without_a_compiler_the_way_is_told(machine, monkeypatch):
    assert machine.build() == WHOLE and machine.built()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert refusal(machine) == (
        "trl_fast: the C++ kernels do not compile: there is no C++ compiler '/no/such/compiler'. Install g++ (Debian, "
        "Ubuntu: `apt-get install g++`) or set CXX to another compiler, then run `pip install .`; or `TRL_FAST_PURE=1 "
        "pip install .` for plain PyTorch, which is slower."
    )


def test_an_error_of_the_cpp_compiler_is_quoted(machine):
    machine.install(machine.gcc, GCC_FAILS)
    assert "do not compile: vec.h:9:1: error: 'hypot' was not declared in this scope. Install" in refusal(machine)


def test_without_torch_the_way_is_told(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "there is no torch here. Run `pip install torch`, then `pip install .`; or `TRL" in refusal(machine)


def test_pure_python_on_request(machine, monkeypatch):
    monkeypatch.setenv("TRL_FAST_PURE", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    reason = "TRL_FAST_PURE=1 was set when it was installed"
    assert machine.build() == {"torch": None, "cuda": None, "missing": {"extension": reason}}
    assert not machine.built() and machine.commands() == []


def test_what_is_compiled_requires_its_torch(setup_module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    assert setup_module.compiled_for() == [f"torch=={RELEASE}.*"]
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert setup_module.compiled_for() == []
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setenv("TRL_FAST_PURE", "1")
    assert setup_module.compiled_for() == []


@pytest.mark.parametrize(("cuda", "tag"), [(None, "cpu"), ("13.0", "cu130")])
def test_a_named_wheel_has_its_torch_in_the_version(setup_module, monkeypatch, cuda, tag):
    assert setup_module.version_tag() == ""
    monkeypatch.setenv("TRL_FAST_NAMED_WHEEL", "1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert setup_module.version_tag() == f"+torch{RELEASE}.{tag}"


def test_cuda_sources_are_all_of_them(setup_module):
    found = {ROOT / name for name in setup_module.cuda_sources()}
    found |= {ROOT / "csrc" / "cuda" / f"{name}.cu" for name in setup_module.CUDA_TARGETS_OF_SOURCE}
    assert found == {path for ending in ("cu", "cpp") for path in (ROOT / "csrc" / "cuda").glob(f"*.{ending}")}


def test_gcc_shares_rows_among_threads_and_no_compiler_is_no_error_yet(setup_module, tmp_path):
    compiler = tmp_path / "compiler"
    for banner, flags in (("Free Software Foundation, Inc.", ["-fopenmp"]), ("clang version 19", [])):
        compiler.write_text(f"#!/bin/sh\necho '{banner}'\n")
        compiler.chmod(0o755)
        assert setup_module.parallel_flags(str(compiler)) == flags
    assert setup_module.parallel_flags(str(tmp_path / "missing")) == []


@pytest.mark.parametrize(
    ("processor", "isas", "tiles"),
    [
        ("x86_64", ["DEFAULT", "AVX2", "AVX512"], ["EMULATED_AMX", "AMX"]),
        ("aarch64", ["DEFAULT"], ["EMULATED_AMX"]),
    ],
)
def test_instruction_sets(setup_module, processor, isas, tiles):
    assert setup_module.instruction_sets(processor) == isas
    assert setup_module.tile_sets(processor) == tiles


def test_a_command_names_the_folder_or_the_archive(tmp_path):
    assert build_backend.source_name(tmp_path) == "."
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: trl-fast\nVersion: 0.1.0\n")
    assert build_backend.source_name(tmp_path) == "trl_fast-0.1.0.tar.gz"
