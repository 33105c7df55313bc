"""Tests what setup.py builds and says where something is missing or fails, with stand-ins for the compilers."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch
from setuptools import Distribution, Extension
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
# Writes what is asked for with -o, after `failure`; answers questions about itself.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0 ;;
  --list-gpu-arch) echo compute_90; exit 0 ;;
  -dump*) echo 12.2.0; exit 0 ;;
esac
{failure}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""
NVCC_FAILS = "echo 'row_kernels.cu(7): error: no instance matches' >&2; echo '1 error detected' >&2; exit 2"
GCC_FAILS = "echo \"vec.h:9:1: error: 'hypot' was not declared in this scope\" >&2; exit 1"
AGAIN = "install again with `pip install --no-build-isolation`"


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
        path.write_text(COMPILER.format(log=shlex.quote(str(log)), failure=failure))
        path.chmod(0o755)

    install(cuda_home / "bin" / "nvcc")
    install(tmp_path / "gcc")
    for name in setup_module.CUDA_HEADERS:
        (cuda_home / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (cuda_home / "include" / name).touch()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(cuda_home))
    # What pip has brought for a CUDA build of torch, where these tests run in one.
    monkeypatch.setattr(setup_module, "pip_cuda_includes", list)
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, str(tmp_path / "gcc"))
    monkeypatch.setenv("LDSHARED", f"{tmp_path / 'gcc'} -shared")
    for name in ("TRL_FAST_REQUIRE_EXT", "TRL_FAST_PURE", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)

    def build() -> dict[str, str]:
        distribution = Distribution({"name": "trl_fast", "ext_modules": [Extension("trl_fast._C", sources=[])]})
        command = setup_module.BuildExtensionOrNot(distribution)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        command.ensure_finalized()
        command.run()
        return json.loads((tmp_path / "lib" / "trl_fast" / "_build.json").read_text())

    def built() -> bool:
        return bool(list((tmp_path / "lib" / "trl_fast").glob("_C.*.so")))

    def commands() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    return SimpleNamespace(
        build=build, built=built, commands=commands, install=install, cuda_home=cuda_home, gcc=tmp_path / "gcc"
    )


def test_a_whole_toolkit_gives_both_parts(machine):
    assert machine.build() == {} and machine.built()
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
    assert machine.build() == {} and machine.built()
    assert targets_of(machine.commands(), "cuda/row_kernels.cu") == {"sm_90a"}
    assert targets_of(machine.commands(), "cuda/loss_kernels.cu") == others
    (link,) = [line for line in machine.commands() if "-shared" in line]
    assert link.count("cuda/row_kernels.o") == 1 and link.count("cuda/loss_kernels.o") == 1


def test_a_source_that_fails_for_its_own_gpus_leaves_the_cpp_part(machine, setup_module, monkeypatch):
    monkeypatch.setattr(setup_module, "CUDA_TARGETS_OF_SOURCE", {"row_kernels": ("90a",)})
    machine.install(machine.cuda_home / "bin" / "nvcc", NVCC_FAILS)
    assert "row_kernels.cu(7): error: no instance matches" in machine.build()["cuda"] and machine.built()


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


def test_an_nvcc_that_fails_leaves_the_cpp_part(machine, capfd):
    machine.install(machine.cuda_home / "bin" / "nvcc", NVCC_FAILS)
    reason = (
        f"row_kernels.cu(7): error: no instance matches; CUDA_HOME is {machine.cuda_home}: if that is not a "
        f"whole toolkit of CUDA 13.0, set it to one, and {AGAIN}"
    )
    assert machine.build() == {"cuda": reason} and machine.built()
    assert "-DTRL_FAST_HAS_CUDA" not in [line for line in machine.commands() if "bindings.cpp" in line][-1]
    out = capfd.readouterr().out
    assert out.count("WARNING: trl_fast:") == 1
    assert f"WARNING: trl_fast: the extension's CUDA part is not built: {reason}." in out


@pytest.mark.parametrize("name", ["cuda_runtime.h", "crt/host_config.h"])
def test_a_toolkit_without_headers_is_not_tried(machine, name, capfd):
    (machine.cuda_home / "include" / name).unlink()
    reason = (
        f"there is no include/{name} in {machine.cuda_home}, where its bin/nvcc is; set CUDA_HOME to the folder of a "
        f"CUDA 13.0 toolkit and {AGAIN}"
    )
    assert machine.build() == {"cuda": reason} and machine.built()
    assert not any(".cu" in line for line in machine.commands())
    assert f"WARNING: trl_fast: the extension's CUDA part is not built: {reason}." in capfd.readouterr().out


def test_headers_may_lie_where_conda_or_pip_put_them(machine, setup_module, monkeypatch, tmp_path):
    runtime, host = (machine.cuda_home / "include" / name for name in setup_module.CUDA_HEADERS)
    (machine.cuda_home / "targets" / "x86_64-linux" / "include" / "crt").mkdir(parents=True)
    host.rename(machine.cuda_home / "targets" / "x86_64-linux" / "include" / "crt" / "host_config.h")
    (tmp_path / "pip").mkdir()
    runtime.rename(tmp_path / "pip" / "cuda_runtime.h")
    assert "cuda_runtime.h" in machine.build()["cuda"]
    monkeypatch.setattr(setup_module, "pip_cuda_includes", lambda: [str(tmp_path / "pip")])
    assert machine.build() == {}


def test_a_cpu_build_of_torch_is_no_fault(machine, monkeypatch, capfd):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("TRL_FAST_REQUIRE_EXT", "1")
    assert machine.build() == {"cuda": "this torch is built without CUDA"} and machine.built()
    assert "WARNING: trl_fast" not in capfd.readouterr().out


def test_no_toolkit_is_no_fault_either_but_said(machine, monkeypatch, capfd):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("TRL_FAST_REQUIRE_EXT", "1")
    assert machine.build()["cuda"].startswith("no CUDA toolkit was found; set CUDA_HOME") and machine.built()
    assert "CUDA part is not built: no CUDA toolkit was found" in capfd.readouterr().out


def test_without_a_compiler_nobody_is_sent_to_cuda(machine, monkeypatch):
    assert machine.build() == {} and machine.built()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    reason = f"there is no C++ compiler '/no/such/compiler' (install one, or set CXX); mend that and {AGAIN}"
    assert machine.build() == {"extension": reason}
    assert not machine.built(), "what an earlier build left would be taken for this one"


def test_an_error_of_the_cpp_compiler_is_quoted(machine):
    machine.install(machine.gcc, GCC_FAILS)
    reason = f"vec.h:9:1: error: 'hypot' was not declared in this scope; mend that and {AGAIN}"
    assert machine.build() == {"extension": reason} and not machine.built()


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("nvcc", "the extension's CUDA part is not built: row_kernels.cu"),
        ("gcc", "C\\+\\+ extension is not built: vec.h"),
    ],
)
def test_what_is_required_and_fails_is_an_error(machine, monkeypatch, fails, message):
    monkeypatch.setenv("TRL_FAST_REQUIRE_EXT", "1")
    path = machine.cuda_home / "bin" / "nvcc" if fails == "nvcc" else machine.gcc
    machine.install(path, NVCC_FAILS if fails == "nvcc" else GCC_FAILS)
    with pytest.raises(RuntimeError, match=f"trl_fast: .*{message}"):
        machine.build()


def test_without_torch_the_way_is_told(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"pip install --no-build-isolation \.`, or set TRL_FAST_PURE=1"):
        machine.build()


def test_pure_python_on_request(machine, monkeypatch):
    monkeypatch.setenv("TRL_FAST_PURE", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine.build()["extension"].startswith("TRL_FAST_PURE was set when it was installed")
    assert not machine.built() and machine.commands() == []


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


@pytest.mark.parametrize(("processor", "isas"), [("x86_64", ["DEFAULT", "AVX2", "AVX512"]), ("aarch64", ["DEFAULT"])])
def test_instruction_sets(setup_module, processor, isas):
    assert setup_module.instruction_sets(processor) == isas
