"""Prints what is installed, which kernels are loaded and why others are not, and a verdict: `trl-fast env`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from trl_fast.console import FILE_WIDTH, make_console

from .verdict import verdict_here

PACKAGES = (
    "trl-fast",
    "triton",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "trl",
    "bitsandbytes",
    "deepspeed",
    "liger-kernel",
    "kernels",
    "vllm",
)
HELP = """usage: trl-fast env

Prints versions, backends with reasons, facts about this machine and, last, a
verdict: which kernels serve it, and the command that brings better ones if
there are any."""
CPU_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def versions() -> list[tuple[str, str]]:
    """Returns (name, value) of the platform and of every package that matters."""
    import torch

    rows = [("platform", platform.platform()), ("python", platform.python_version())]
    # Its metadata does not say for which CUDA it is built.
    rows.append(("torch", torch.__version__))
    for package in PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def binary_parts() -> list[tuple[str, str]]:
    """Returns (name, value) of the compiled extension and of the Triton kernels, with the files they come from."""
    from trl_fast.build_record import read_build_record
    from trl_fast.ops.backends import load_extension
    from trl_fast.ops.head.cutlass_scores import cutlass_is_built

    rows, record = [], read_build_record()
    spec = importlib.util.find_spec("trl_fast._C")
    if spec is None:
        rows.append(("trl_fast._C", f"not built: {record.why_missing('extension')}"))
    else:
        loaded = load_extension()
        rows.append(("trl_fast._C", str(spec.origin)))
        if loaded.ok:
            from trl_fast import _C

            rows += [(f"  {name}", str(value)) for name, value in _C.build_info().items()]
            if not _C.build_info()["cuda"]:
                rows.append(("  CUDA part", f"not built: {record.why_missing('cuda')}"))
            elif not cutlass_is_built():
                rows.append(("  CUTLASS part", f"not built: {record.why_missing('cutlass')}"))
        else:
            rows.append(("  does not load", loaded.reason))
    kernels = importlib.util.find_spec("trl_fast.kernels")
    places = list(kernels.submodule_search_locations or []) if kernels else []
    rows.append(("trl_fast.kernels", ", ".join(places) or "not found"))
    return rows


def cpu_facts() -> list[tuple[str, str]]:
    """Returns (name, value) of the processor, as far as /proc tells."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    return [
        ("model", fields.get("model name", platform.processor() or platform.machine())),
        ("cores, torch threads", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        ("instruction sets", " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown"),
        ("torch runs", torch.backends.cpu.get_cpu_capability()),
        ("bfloat16 products in hardware", "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no"),
    ]


def gpu_facts() -> list[tuple[str, str]]:
    """Returns (name, value) of every CUDA device that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return [("GPU", f"none seen by torch (CUDA build: {torch.version.cuda or 'no'})")]
    from trl_fast.modeling.attention.flash_3 import flash_3_serves

    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"))
    serves, reason = flash_3_serves(torch.device("cuda", torch.cuda.current_device()))
    return [*rows, ("FlashAttention 3", f"{'yes' if serves else 'no'}: {reason}")]


def backends() -> list[tuple[str, str, str]]:
    """Returns (backend, yes or no, reason) for the best device of this machine."""
    import torch

    from trl_fast.ops.backends import backend_table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [(row.backend, "yes" if row.ok else "no", row.reason) for row in backend_table(device)]


def layer_kernels() -> list[tuple[str, str, str]]:
    """Returns (what is computed, yes or no, the package or why not) of the kernels of layers that carry a state."""
    from trl_fast.modeling.layer_kernels import LAYER_KERNELS

    return [(kernel.serves, "yes" if ok else "no", why) for kernel in LAYER_KERNELS for ok, why in [kernel.fitness()]]


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Refuses arguments; returns what prints the tables."""
    if arguments in (["-h"], ["--help"]):
        return print_help
    if arguments:
        raise ValueError(f"trl-fast env takes no arguments, got {' '.join(arguments)}")
    return print_environment


def print_help() -> int:
    """Prints what the command does and returns the exit status."""
    print(HELP)
    return 0


def print_environment() -> int:
    """Prints the tables and returns the exit status."""
    console = make_console(file_width=FILE_WIDTH)
    sections: dict[str, Sequence[tuple[str, ...]]] = {
        "versions": versions(),
        "compiled parts": binary_parts(),
        "backends": backends(),
        "kernels of hybrid models": layer_kernels(),
        "CPU": cpu_facts(),
        "GPU": gpu_facts(),
    }
    for title, rows in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for _ in rows[0] if rows else ():
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Verdict: {verdict_here()}", soft_wrap=True, highlight=False)
    return 0
