"""Reads what the build wrote down: for which torch the extension was compiled, and why a part of it is missing."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlparse

PACKAGE = Path(__file__).parent
NO_RECORD = "no build is on record here"


@dataclass(frozen=True)
class BuildRecord:
    """Holds what setup.py wrote down.

    - `torch`: the release of torch that was compiled against, such as "2.13"; None: nothing was compiled.
    - `cuda`: the CUDA of the part for GPUs, such as "13.0"; None: there is no such part.
    - `missing`: why "extension", "cuda" or, of the latter, "cutlass" is missing.
    """

    torch: str | None = None
    cuda: str | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def why_missing(self, part: str) -> str:
        """Returns why "extension", "cuda" or "cutlass" is missing."""
        return self.missing.get(part, NO_RECORD)


def read_build_record(folder: Path = PACKAGE) -> BuildRecord:
    """Reads the record of the build that made the package in a folder; an empty one where there is none."""
    try:
        return BuildRecord(**json.loads((folder / "_build.json").read_text()))
    except (OSError, ValueError, TypeError):
        return BuildRecord()


@dataclass(frozen=True)
class Installation:
    """Holds how the package came here: by "pip" or "uv", from a folder, a file, or (empty) from an index."""

    tool: str = "pip"
    source: str = ""
    editable: bool = False


@functools.cache
def read_installation() -> Installation:
    """Reads how the package was installed; a source tree that was not counts as what would be installed from it."""
    root = PACKAGE.parent
    tree = Installation(source=str(root), editable=True) if (root / "setup.py").is_file() else Installation()
    try:
        distribution = importlib.metadata.distribution("trl-fast")
    except importlib.metadata.PackageNotFoundError:
        return tree
    tool = "uv" if (distribution.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    try:
        place = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        place = {}
    url = str(place.get("url", ""))
    source = unquote(urlparse(url).path) if url.startswith("file:") else f"git+{url}" if "vcs_info" in place else url
    if not source:
        return replace(tree, tool=tool)
    return Installation(tool, source, bool(place.get("dir_info", {}).get("editable")))


def build_again(installation: Installation, **variables: str) -> str:
    """Returns the command, in backquotes, that compiles and installs the package again.

    variables: for its environment.
    """
    source, again = installation.source, "--force-reinstall --no-deps --no-cache-dir"
    if installation.tool == "uv":
        again = "--no-build-isolation --no-deps --reinstall-package trl-fast"
    if not source or source.endswith(".whl"):  # the wheel is of no use: what it lacks has to be compiled
        source, again = "trl-fast", f"{again} --no-binary trl-fast"
    tool = "uv pip" if installation.tool == "uv" else "pip"
    words = [*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), tool, "install", again]
    words += [*(["-e"] if installation.editable and source == installation.source else []), shlex.quote(source)]
    return f"`{' '.join(words)}`"


def why_refused(record: BuildRecord, torch: str, cuda: str | None, again: str) -> str:
    """Returns why an extension must not be loaded beside a torch, in one line; empty if it may.

    Args:
        torch, cuda: the version of this torch, such as "2.13.0+cu130", and the CUDA that it was built with.
        again: the command that compiles the package again, in backquotes.
    """
    if record.torch is None:
        return ""
    built = f"torch {record.torch}" + (f" with CUDA {record.cuda}" if record.cuda else "")
    here = f"torch {torch}" + (f" with CUDA {cuda}" if cuda else " without CUDA")
    same_cuda = record.cuda is None or (cuda or "").split(".")[0] == record.cuda.split(".")[0]
    if ".".join(torch.split(".")[:2]) == record.torch and same_cuda:
        return ""
    return (
        f"trl_fast is compiled for {built}, and this is {here}: run {again}, or go back with `pip install "
        f"'torch=={record.torch}.*'`"
    )
