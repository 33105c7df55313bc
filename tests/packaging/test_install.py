"""Tests installations: our kernels under our name only, plain PyTorch on request, and never without being told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
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
import trl_fast.kernels.row_kernels
spec = importlib.util.find_spec("kernels")
print(None if spec is None else spec.origin, is_kernels_available(), trl_fast.kernels.row_kernels.__file__)
"""


PURE = "TRL_FAST_PURE=1 was set when it was installed"


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


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """A source distribution, from a folder in which something was compiled before."""
    target = tmp_path_factory.mktemp("sdist")
    (source / "trl_fast" / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    (source / "trl_fast" / "_build.json").write_text("{}")
    built = run(sys.executable, "setup.py", "-q", "sdist", "-d", target, cwd=source)
    assert built.returncode == 0, built.stderr[-2000:]
    (path,) = target.glob("*.tar.gz")
    return path


def test_a_source_distribution_has_all_that_a_build_and_the_tests_need(sdist, source):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "kernels", "trl_fast", "tests", "benchmarks", "examples", "docs")
    left_out = ("*.so", "*.pyc", "_build.json")
    needed = {
        str(path.relative_to(source))
        for folder in folders
        for path in (source / folder).rglob("*")
        if path.is_file() and not any(map(path.match, left_out))
    }
    assert not needed - names
    assert {"LICENSE", "README.md", "CONTRIBUTING.md", "setup.py", "pyproject.toml", "MANIFEST.in"} <= names
    assert {"build_backend.py", "requirements.txt"} <= names
    assert not [name for name in names if any(map(Path(name).match, left_out))]


@pytest.mark.slow  # It compiles the whole extension: about a minute.
def test_a_source_distribution_installs_and_has_the_extension(sdist, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", site)
    done = run(*command, sdist, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-2000:]
    script = WITHOUT_EDITABLE + "import torch; from trl_fast import _C; print(_C.__file__); "
    script += "from trl_fast.ops import supports; print(supports('linear_logprob', 'cpp', 'cpu', torch.float32).ok)"
    done = run(sys.executable, "-c", script, cwd=elsewhere, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    place, ok = done.stdout.split()
    assert Path(place).parent == site / "trl_fast" and ok == "True"
    assert (site / "trl_fast-0.1.0.dist-info" / "licenses" / "LICENSE").is_file()


def build_wheel(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", target, source)
    return run(*command, cwd=target, CXX="/no/such/compiler", **environment)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A wheel in plain PyTorch, on request."""
    target = tmp_path_factory.mktemp("wheel")
    built = build_wheel(source, target, TRL_FAST_PURE="1")
    assert built.returncode == 0, built.stderr[-2000:]
    (path,) = target.glob("trl_fast-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel, cwd=target)
    assert done.returncode == 0, done.stderr
    return target


def test_without_a_compiler_the_last_words_are_the_command_that_works(source, tmp_path):
    built = build_wheel(source, tmp_path)
    assert built.returncode != 0 and not list(tmp_path.glob("*.whl"))
    said = built.stdout + built.stderr
    (line,) = [line.strip() for line in said.splitlines() if "trl_fast: the C++ kernels" in line]
    assert "there is no C++ compiler '/no/such/compiler'. Install g++" in line and "TRL_FAST_PURE=1 pip" in line
    assert "Traceback" not in said


def test_the_wheel_holds_every_package_under_our_name(wheel, source):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"trl_fast"}
    assert {"trl_fast/py.typed", "trl_fast/_C.pyi"} <= set(names)
    missing = [
        str(path.relative_to(source))
        for ending in ("py", "yaml")
        for path in (source / "trl_fast").rglob(f"*.{ending}")
        if str(path.relative_to(source)) not in names
    ]
    assert not missing
    assert {f"trl_fast/kernels/{path.name}" for path in (source / "kernels").glob("*.py")} <= set(names)


# One process answers what an installed wheel is asked: each would take seconds to import torch.
ASK_THE_INSTALLED = (
    WITHOUT_EDITABLE
    + """
import torch
from trl_fast.ops import linear_logprob, supports
from trl_fast.cli.main import main
print(linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([1, 2])).logprobs.tolist())
print(supports("linear_logprob", "cpp", "cpu", torch.float32).reason)
print("---", flush=True)
main(["env"])
print("---", flush=True)
"""
    + LOOK_FOR_KERNELS
)


@pytest.fixture(scope="module")
def answers(installed, tmp_path_factory) -> tuple[list[str], str]:
    """Returns what an installed wheel prints, in three parts (scores, `env`, kernels), and what it says on stderr."""
    place = tmp_path_factory.mktemp("elsewhere")
    done = run(sys.executable, "-c", ASK_THE_INSTALLED, cwd=place, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    return done.stdout.split("---\n"), done.stderr


def test_an_installed_wheel_works_in_pure_pytorch(answers):
    (scores, _, _), stderr = answers
    logprobs, reason = scores.strip().split("\n")
    assert eval(logprobs) == pytest.approx([-2.0794415] * 2)
    assert reason.startswith(f"the C++ extension is not built: {PURE}; to build it run `pip install --force-reinstall")
    assert stderr.count("Until then everything runs in pure PyTorch") == 1


def test_env_says_why_there_is_no_extension(answers):
    (_, shown, _), _ = answers
    text = " ".join(shown.replace("│", " ").split())
    assert f"trl_fast._C not built: {PURE}" in text
    assert f"Verdict: plain PyTorch, without kernels ({PURE}): run `pip install" in shown.splitlines()[-1]


def test_an_installed_wheel_has_no_package_called_kernels(answers, installed):
    (_, _, found), _ = answers
    assert found.split() == ["None", "False", str(installed / "trl_fast" / "kernels" / "row_kernels.py")]


def test_a_wheel_of_another_torch_is_refused_by_name(installed, tmp_path):
    """The record says another torch; the extension beside it is none: it must not even be loaded."""
    copy = tmp_path / "site"
    shutil.copytree(installed, copy)
    (copy / "trl_fast" / "_build.json").write_text('{"torch": "2.10", "cuda": null, "missing": {}}')
    (copy / "trl_fast" / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    script = WITHOUT_EDITABLE + "import torch; from trl_fast.ops import linear_logprob as score;"
    script += "print(score(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([1, 2])).logprobs.tolist())"
    done = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(copy))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: trl_fast is compiled for torch 2.10, and this is torch 2.")
    assert "run `pip install" in last and "undefined symbol" not in done.stderr
    forced = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(copy), TRL_FAST_BACKEND="torch")
    assert forced.returncode == 0, forced.stderr


def test_from_the_repository_root_kernels_is_nobodys_module(tmp_path):
    """A folder without __init__.py is at most a namespace: it has no origin, and transformers ignores it."""
    done = run(sys.executable, "-c", LOOK_FOR_KERNELS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", "False", str(ROOT / "kernels" / "row_kernels.py")]


def test_from_the_repository_root_the_real_kernels_package_wins(tmp_path):
    real = tmp_path / "kernels"
    real.mkdir()
    (real / "__init__.py").write_text("__version__ = '1.0'\n")
    script = "import kernels; print(kernels.__file__)"
    done = run(sys.executable, "-c", script, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(real / "__init__.py"), done.stderr


def test_elsewhere_the_editable_install_has_the_compiled_extension(tmp_path):
    script = "import torch; from trl_fast import _C; import trl_fast.kernels.row_kernels as r\n"
    script += "print(_C.build_info()['isas'], r.__file__)"
    done = run(sys.executable, "-c", script, cwd=tmp_path)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip("this environment was installed without a compiler")
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout and done.stdout.split()[-1] == str(ROOT / "kernels" / "row_kernels.py")
