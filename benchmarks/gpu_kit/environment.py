"""Names the machine: versions, card, which backends serve and which do not, with their reasons."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

import torch

from trl_fast.ops import backend_table

from .phase_context import Kit

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "peft", "trl", "liger-kernel")
OTHERS = ("cut-cross-entropy", "trl-fast", "numpy")


def run(kit: Kit) -> None:
    kit.facts.add("python", version=platform.python_version())
    for package in (*PACKAGES, *OTHERS):
        try:
            kit.facts.add(package, version=importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            kit.facts.skip(package, "not installed")
    if kit.is_gpu:
        properties = torch.cuda.get_device_properties(kit.device)
        kit.facts.add(
            "card",
            name=properties.name,
            memory_bytes=properties.total_memory,
            processors=properties.multi_processor_count,
            cache_bytes=properties.L2_cache_size,
            capability=f"{properties.major}.{properties.minor}",
            driver=_driver(),
        )
    for row in backend_table(kit.device):
        kit.facts.add(f"backend {row.backend}", serves=row.ok, reason=row.reason)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
