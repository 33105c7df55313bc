"""What an installation holds: our kernels under our name only, and pure PyTorch where nothing can be compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# This environment may have the repository installed in editable mode, which answers imports that the wheel cannot.
WITHOUT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
)

# What `import kernels` finds, and whether transformers takes it for the Hugging Face package of that name.
LOOK_FOR_KERNELS = """
import importlib.util
from transformers.utils.import_utils import is_kernels_available
import trl_fast.kernels.rows
spec = importlib.util.find_spec("kernels")
print(None if spec is None else spec.origin, is_kernels_available(), trl_fast.kernels.rows.__file__)
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": "", **environment}
    command = tuple(map(str, command))
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The files that git knows, as a newcomer gets them."""
    copy = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\n")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return copy


def build_wheel(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", target, source)
    return run(*command, cwd=target, CXX="/no/such/compiler", **environment)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> tuple[Path, str]:
    """A wheel built without a compiler, and what was printed meanwhile."""
    target = tmp_path_factory.mktemp("wheel")
    built = build_wheel(source, target, TRL_FAST_REQUIRE_EXT="0")
    assert built.returncode == 0, built.stderr[-2000:]
    (path,) = target.glob("trl_fast-*.whl")
    return path, built.stdout + built.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel[0], cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def test_without_a_compiler_one_line_says_so(wheel):
    lines = [line for line in wheel[1].splitlines() if "the C++ extension is not built" in line]
    assert len(lines) == 1
    assert "everything runs in PyTorch" in lines[0]


def test_a_required_extension_that_cannot_be_built_is_an_error(source, tmp_path):
    built = build_wheel(source, tmp_path, TRL_FAST_REQUIRE_EXT="1")
    assert built.returncode != 0
    assert "RuntimeError: trl_fast: the C++ extension is not built" in built.stdout + built.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_the_wheel_holds_every_package_under_our_name(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"trl_fast"}
    missing = [
        str(path.relative_to(ROOT))
        for ending in ("py", "yaml")
        for path in (ROOT / "trl_fast").rglob(f"*.{ending}")
        if str(path.relative_to(ROOT)) not in names
    ]
    assert not missing
    assert {f"trl_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= set(names)


def test_an_installed_wheel_works_in_pure_pytorch(installed, tmp_path):
    script = WITHOUT_EDITABLE + (
        "import torch; from trl_fast.ops import linear_logprob, supports;"
        "print(linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([1, 2])).logprobs.tolist());"
        "print(supports('linear_logprob', 'cpp', 'cpu', torch.float32).reason)"
    )
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    logprobs, reason = done.stdout.strip().split("\n")
    assert eval(logprobs) == pytest.approx([-2.0794415] * 2)
    assert reason.startswith("the C++ extension is not built; install a C++ compiler")


def test_an_installed_wheel_has_no_package_called_kernels(installed, tmp_path):
    done = run(sys.executable, "-c", WITHOUT_EDITABLE + LOOK_FOR_KERNELS, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["None", "False"]
    assert done.stdout.split()[2] == str(installed / "trl_fast" / "kernels" / "rows.py")


def test_from_the_repository_root_kernels_is_nobodys_module(tmp_path):
    """A folder without __init__.py is at most a namespace: it has no origin, and transformers ignores it."""
    done = run(sys.executable, "-c", LOOK_FOR_KERNELS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "False", str(ROOT / "kernels" / "rows.py")]


def test_from_the_repository_root_the_real_kernels_package_wins(tmp_path):
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("__version__ = '1.0'\n")
    script = "import kernels; print(kernels.__file__)"
    done = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(real / "__init__.py"), done.stderr


def test_elsewhere_the_editable_install_has_the_compiled_extension(tmp_path):
    script = "import torch; from trl_fast import _C; import trl_fast.kernels.rows as r\n"
    script += "print(_C.build_info()['isas'], r.__file__)"
    done = run(sys.executable, "-c", script, cwd=tmp_path)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip("this environment was installed without a compiler")
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout and done.stdout.split()[-1] == str(ROOT / "kernels" / "rows.py")


@pytest.fixture
def setup_module(monkeypatch):
    """setup.py without its call of setup()."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("trl_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cuda_sources_join_by_toolkit_and_torch_not_by_a_visible_gpu(setup_module, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert setup_module.cuda_sources(None, "13.0") == []
    assert setup_module.cuda_sources(str(tmp_path), None) == []
    assert setup_module.cuda_sources(str(tmp_path / "elsewhere"), "13.0") == []
    found = setup_module.cuda_sources(str(tmp_path), "13.0")
    assert {Path(name) for name in found} >= {path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu")}


def test_gcc_shares_rows_among_threads_and_no_compiler_is_no_error_yet(setup_module, tmp_path):
    compiler = tmp_path / "compiler"
    for banner, flags in (("Free Software Foundation, Inc.", ["-fopenmp"]), ("clang version 19", [])):
        compiler.write_text(f"#!/bin/sh\necho '{banner}'\n")
        compiler.chmod(0o755)
        assert setup_module.parallel_flags(str(compiler)) == flags
    assert setup_module.parallel_flags(str(tmp_path / "missing")) == []


@pytest.mark.parametrize(("machine", "isas"), [("x86_64", ["DEFAULT", "AVX2", "AVX512"]), ("aarch64", ["DEFAULT"])])
def test_instruction_sets(setup_module, machine, isas):
    assert setup_module.instruction_sets(machine) == isas
