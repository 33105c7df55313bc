"""The ways to install trl_fast, in one table: `make test-install` runs them, and docs/install.md shows them.

Each environment is a new virtual environment in a temporary folder, made once and removed after its rows. The rows run
their commands literally, in a copy of the files that git knows. What a row gives is asked of the installed package:
what the build wrote down, whether the extension loads and scores a token, and the verdict of `trl-fast env`.

    python -m support.install_matrix                   # every row that is tested: about 40 minutes on two cores
    python -m support.install_matrix --only 3.11-2.13  # the rows of one environment
    python -m support.install_matrix --write           # writes the table into docs/install.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from support.source_tree import ROOT
from trl_fast.console import make_console

PAGE = ROOT / "docs" / "install.md"
BEGIN, END = "<!-- the table of tests/support/install_matrix.py -->\n", "<!-- end of the table -->\n"
# What a row gives.
CPU, CUDA, PURE = "CPU kernels", "CPU and CUDA kernels", "plain PyTorch"
STOPS, REFUSED = "stops with the command that works", "installs; the first use names both torches"
GXX, NO_COMPILER, NVCC = "g++", "no compiler", "g++, nvcc"
# Variables that would change what a row tests.
HIDDEN = (
    "CC",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "PYTHONPATH",
    "TRL_FAST_PURE",
    "TRL_FAST_CUDA",
    "TRL_FAST_NAMED_WHEEL",
)
LOOK = """
import json, torch
from trl_fast.build_record import read_build_record
from trl_fast.ops import linear_logprob
score = linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([1, 2])).logprobs.tolist()
from trl_fast.ops.backends import load_extension
record = read_build_record()
print(json.dumps([record.torch, record.cuda, load_extension().ok, score]))
"""


@dataclass(frozen=True)
class Environment:
    """Describes the environment that rows install into: its Python, the torch that is there, and what brings it."""

    python: str
    torch: str = ""
    tool: str = "pip"

    @property
    def name(self) -> str:
        """Returns a short name."""
        return f"{self.python}-{self.torch or 'empty'}"


@dataclass(frozen=True)
class Row:
    """Describes a way to install: where, what is on the machine, the command, what it gives, and whether it is run."""

    environment: Environment
    machine: str
    command: str
    gives: str
    tested: bool = True


CPU_213 = Environment("3.11", "2.13")
CUDA_214 = Environment("3.11", "2.14")
EMPTY = Environment("3.11")
WHEEL = "trl_fast-0.1.0+torch2.13.cpu-cp311-cp311-linux_x86_64.whl"
SDIST = "trl_fast-0.1.0.tar.gz"
ROWS = (
    Row(CPU_213, GXX, "pip install .", CPU),
    Row(CPU_213, GXX, "pip install --no-build-isolation .", CPU),
    Row(CPU_213, GXX, "pip install -e .", CPU),
    Row(CPU_213, GXX, "pip install --no-build-isolation -e .", CPU),
    Row(CPU_213, GXX, f"pip install --no-cache-dir dist/{SDIST}", CPU),
    Row(CPU_213, GXX, f"pip install dist/{WHEEL}", CPU),
    Row(CPU_213, GXX, "uv pip install .", CPU),
    Row(CPU_213, GXX, "uv pip install -e .", CPU),
    # In the source tree uv reads pyproject.toml, which says that it must not isolate this build.
    Row(CPU_213, GXX, f"uv pip install dist/{SDIST}", CPU),
    Row(CPU_213, GXX, f"source=$PWD && cd / && uv pip install --no-cache $source/dist/{SDIST}", STOPS),
    Row(CPU_213, NO_COMPILER, "pip install .", STOPS),
    Row(CPU_213, NO_COMPILER, "pip install --no-build-isolation -e .", STOPS),
    Row(CPU_213, NO_COMPILER, "uv pip install .", STOPS),
    Row(CPU_213, NO_COMPILER, "TRL_FAST_PURE=1 pip install .", PURE),
    Row(CPU_213, NO_COMPILER, "TRL_FAST_PURE=1 uv pip install .", PURE),
    Row(EMPTY, GXX, "pip install --no-build-isolation .", STOPS),
    Row(EMPTY, GXX, "uv pip install .", STOPS),
    Row(EMPTY, GXX, "pip install .", "torch, and kernels for it", tested=False),
    Row(CUDA_214, NVCC, "pip install .", CUDA),
    Row(CUDA_214, NVCC, "TRL_FAST_CUDA=0 pip install .", CPU),
    Row(CUDA_214, NVCC, "CUDA_HOME=/no/toolkit pip install .", STOPS),
    Row(CUDA_214, NVCC, "uv pip install .", CUDA),
    Row(CUDA_214, GXX, f"pip install --no-deps dist/{WHEEL}", REFUSED),
    Row(CUDA_214, "g++, no toolkit", "pip install .", f"{CPU}, Triton's on a GPU", tested=False),
    Row(Environment("3.12", "2.11"), NVCC, "pip install .", CUDA),
    Row(Environment("3.10", "2.11"), NVCC, "pip install .", CUDA),
    Row(Environment("3.13", "2.15", "uv pip"), NVCC, "uv pip install .", CUDA),
)


def table(rows: tuple[Row, ...] = ROWS) -> str:
    """Returns the table in Markdown."""
    lines = ["| Python | torch | on the machine | command | gives | tested |", "|---|---|---|---|---|---|"]
    for row in rows:
        place = f"{row.environment.python} | {row.environment.torch or 'none'} | {row.machine}"
        lines.append(f"| {place} | `{row.command}` | {row.gives} | {'yes' if row.tested else 'no'} |")
    return "\n".join(lines) + "\n"


def page_with_table(text: str) -> str:
    """Returns a page's text with the table between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def tested_by_environment() -> dict[Environment, list[Row]]:
    """Returns the rows that are tested, by environment, in the order of the table."""
    environments: dict[Environment, list[Row]] = {}
    for row in ROWS:
        if row.tested:
            environments.setdefault(row.environment, []).append(row)
    return environments


def environment_variables(venv: Path, machine: str) -> dict[str, str]:
    """Returns the variables that a row's command sees, as after `. venv/bin/activate`."""
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    others = "" if machine == NO_COMPILER else f"{os.pathsep}{os.environ['PATH']}"
    return {**kept, "VIRTUAL_ENV": str(venv), "PATH": f"{venv / 'bin'}{others}"}


def shell(command: str, cwd: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command as it stands in the table; its output is one text."""
    words = ["/bin/sh", "-c", command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(words, cwd=cwd, env=dict(variables), timeout=3600, **streams)


def copy_sources(target: Path) -> None:
    """Copies the files that git knows, as a newcomer gets them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def interpreter(version: str) -> str:
    """Returns the path of a Python of this version: this one, one in PATH, or one of pyenv.

    Raises:
        FileNotFoundError: there is none.
    """
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    root = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    for found in [*Path(root).glob(f"versions/{version}.*/bin/python{version}"), shutil.which(f"python{version}")]:
        if found:
            return str(found)
    raise FileNotFoundError(f"there is no python{version}")


def make_environment(environment: Environment, folder: Path) -> Path:
    """Makes a virtual environment with its torch and what trl_fast needs, and uv; returns its folder.

    Raises:
        RuntimeError: a package could not be installed.
    """
    venv = folder / environment.name
    subprocess.run([interpreter(environment.python), "-m", "venv", str(venv)], check=True)
    commands = ["pip install -q uv"]
    if environment.torch:
        needed = f"'torch=={environment.torch}.*' ninja 'setuptools>=77'"
        commands += [f"{environment.tool} install -q {what}" for what in (needed, "-r requirements.txt")]
    for command in commands:
        done = shell(command, ROOT, environment_variables(venv, GXX))
        if done.returncode:
            raise RuntimeError(f"{environment.name}: {command}: {done.stdout[-1500:]}")
    return venv


def make_distributions(folder: Path, venv: Path, source: Path) -> None:
    """Makes the source distribution and, in the environment of its torch, the wheel; both stay for other rows."""
    dist, kept = source / "dist", folder / "dist"
    if venv.name == CPU_213.name:
        make = (
            "python setup.py -q sdist && TRL_FAST_NAMED_WHEEL=1 pip wheel -q --no-build-isolation --no-deps -w dist ."
        )
        done = shell(make, source, environment_variables(venv, GXX))
        if done.returncode:
            raise RuntimeError(f"make wheel: {done.stdout[-1500:]}")
        shutil.copytree(dist, kept)
    elif kept.exists():
        shutil.copytree(kept, dist)


def outcome(row: Row, venv: Path, source: Path) -> tuple[str, str]:
    """Runs a row's command; returns what it gave and the line that tells it: the verdict, or the last words."""
    variables = environment_variables(venv, row.machine)
    done = shell(row.command, source, variables)
    if done.returncode:
        (*_, line) = [
            "",
            *(line.strip() for line in done.stdout.splitlines() if line.strip().startswith("trl_fast: ")),
        ]
        return (STOPS if "`" in line else "fails without a word of ours"), line or done.stdout[-1500:]
    elsewhere = venv.parent
    looked = shell(f"python -c '{LOOK}'", elsewhere, variables)
    last = looked.stdout.strip().splitlines()[-1]
    if looked.returncode:
        return (REFUSED if last.startswith("ImportError: trl_fast is compiled for torch ") else "does not run"), last
    torch, cuda, loads, score = json.loads(last)
    if abs(score[0] + 2.0794415) > 1e-5 or bool(torch) != loads:
        return "runs, and is wrong", last
    verdict = shell("trl-fast env", elsewhere, variables).stdout.strip().splitlines()[-1]
    return (CUDA if cuda else CPU if torch else PURE), verdict


def run_rows(rows: list[Row], folder: Path, source: Path) -> Iterator[tuple[Row, str, str, float]]:
    """Makes an environment, runs its rows, and removes it; yields row, what it gave, its line and seconds."""
    if rows[0].environment != CPU_213 and any(WHEEL in row.command for row in rows) and not (folder / "dist").exists():
        maker = make_environment(CPU_213, folder)
        copy_sources(folder / "source of the wheel")
        make_distributions(folder, maker, folder / "source of the wheel")
        shutil.rmtree(maker)
    venv = make_environment(rows[0].environment, folder)
    make_distributions(folder, venv, source)
    for row in rows:
        start = time.monotonic()
        given, line = outcome(row, venv, source)
        shell("pip uninstall -q -y trl-fast", folder, environment_variables(venv, GXX))
        yield row, given, line, time.monotonic() - start
    shutil.rmtree(venv)


def run_all(only: str | None) -> int:
    """Runs the rows; returns how many do not do what the table says."""
    console, wrong = make_console(file_width=160), 0
    todo = {e: rows for e, rows in tested_by_environment().items() if only in (None, e.name)}
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="trl-fast-install-") as name,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("", total=sum(map(len, todo.values())))
        for environment, rows in todo.items():
            progress.update(task, description=f"Python {environment.python}, torch {environment.torch or 'none'}")
            source = Path(name) / f"source-{environment.name}"
            copy_sources(source)
            for row, given, line, seconds in run_rows(rows, Path(name), source):
                ok = given == row.gives
                wrong += not ok
                shown = Table.grid(padding=(0, 2))
                shown.add_row(
                    "ok" if ok else "WRONG", environment.name, row.machine, row.command, given, f"{seconds:.0f} s"
                )
                progress.console.print(shown)
                progress.console.print(f"    {line}", soft_wrap=True, highlight=False)
                progress.advance(task)
            shutil.rmtree(source)
    console.print(f"{wrong} of {sum(map(len, todo.values()))} rows do not do what docs/install.md says.")
    return wrong


def main() -> int:
    """Reads the arguments; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[environment.name for environment in tested_by_environment()])
    parser.add_argument("--write", action="store_true", help="write the table into docs/install.md and stop")
    arguments = parser.parse_args()
    if arguments.write:
        PAGE.write_text(page_with_table(PAGE.read_text()))
        return 0
    return 1 if run_all(arguments.only) else 0


if __name__ == "__main__":
    sys.exit(main())
