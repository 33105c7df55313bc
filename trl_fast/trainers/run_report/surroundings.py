"""Describes where a run takes place: versions of packages, the machine, the commit of the code."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess

import torch

_PACKAGES = (
    *("trl_fast", "torch", "triton", "transformers", "datasets", "peft", "accelerate", "tokenizers"),
    *("bitsandbytes", "deepspeed", "vllm", "liger-kernel"),
)
# Seconds that git may take to tell the commit.
_GIT_PATIENCE = 2


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The metadata does not say for which CUDA it is built.
    return {**found, "torch": torch.__version__}


def machine() -> dict[str, object]:
    """Returns facts about this machine; not its name."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


@functools.cache
def git_commit(folder: str) -> str | None:
    """Returns the commit that a folder's repository is at; None where there is none, or no git."""
    try:
        found = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=_GIT_PATIENCE
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
