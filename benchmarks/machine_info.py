"""Names the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from trl_fast.ops.matmul import gemm_dtype

from .memory import GIB


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's model, with family and model number where the system tells: some models share a name."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    # The first processor's block; some architectures name no model in it.
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{field.removeprefix('cpu ')} {fields[field]}" for field in ("cpu family", "model") if field in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def describe_machine() -> dict[str, object]:
    """Describes CPU, cores, memory; torch's version, threads, instruction set, and its dtype for bf16 products."""
    return {
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "torch": torch.__version__,
        "bf16_products": str(gemm_dtype(torch.empty(0, dtype=torch.bfloat16))).removeprefix("torch."),
    }
