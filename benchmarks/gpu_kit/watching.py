"""Lets the toolkit's own programs watch small calls: hardware counters of kernels, invalid accesses, races.

`ncu` and `compute-sanitizer` come with CUDA's toolkit; a machine without them is told of. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

from .phase_context import Kit

METRICS = {
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "us": "gpu__time_duration.sum",
}
_KERNELS = "regex:row_|linear_scores|merge|nvjet"
CHECKS = (
    *(("memcheck", name) for name in ("kernels", "layers", "attention", "divergences")),
    *(("racecheck", name) for name in ("kernels", "layers", "divergences")),
    ("memcheck", "losses"),
)
# Each tensor in memory of its own: in a cache's large blocks no tool sees where one ends.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# A tool's own start, and what the call takes under it.
_LEAST_SECONDS = 20


def run(kit: Kit) -> None:
    counters(kit)
    for tool, name in CHECKS:
        if kit.late(f"{tool} of {name}", 0 if kit.tiny else _LEAST_SECONDS):
            return
        check(kit, tool, name)


def _call(kit: Kit, name: str, size: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_kit.one_call", name, "--size", size, "--device", str(kit.device)]


def counters(kit: Kit) -> None:
    """Adds one fact a kernel: what share of the memory's and the processors' peak it reaches."""
    what = "hardware counters"
    program = shutil.which("ncu")
    if program is None or not kit.is_gpu:
        kit.facts.skip(what, "ncu is not installed" if program is None else "there is no GPU")
        return
    words = ["--csv", "--clock-control", "none", "--metrics", ",".join(METRICS.values()), "-k", _KERNELS, "-c", "40"]
    found = _ended([program, *words, *_call(kit, "kernels", "large")], kit)
    printed = "it ran past its time" if found is None else found.stdout + found.stderr
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    if not lines:
        kit.facts.skip(what, printed.strip()[-200:])
        return
    kernels: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    names = {metric: name for name, metric in METRICS.items()}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        if row.get("Metric Name") in names:
            key = (row["ID"], row["Kernel Name"].partition("(")[0])
            kernels[key][names[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    for (_, kernel), values in kernels.items():
        kit.facts.add(f"{what} of {kernel[-80:]}", **values)


def check(kit: Kit, tool: str, name: str) -> None:
    """Adds a fact: whether the tool found anything wrong in a small call; its first words if so."""
    what = f"{tool} of {name}"
    program = shutil.which("compute-sanitizer")
    if program is None or not kit.is_gpu:
        kit.facts.skip(what, "compute-sanitizer is not installed" if program is None else "there is no GPU")
        return
    found = _ended([program, "--tool", tool, "--error-exitcode", "0", *_call(kit, name, "small")], kit, _UNCACHED)
    if found is None:
        kit.facts.skip(what, "it ran past its time")
        return
    errors, said = errors_in(found.stdout + found.stderr)
    if errors:
        kit.facts.add(f"WRONG {what}: {said}", error=float("inf"), allowed=0.0)
    elif errors is None or found.returncode:
        kit.facts.skip(what, f"the call ended with {found.returncode}: {said}")
    else:
        kit.facts.add(f"check {what}", right=1, wrong=0)


def errors_in(printed: str) -> tuple[int | None, str]:
    """Returns how many errors or hazards a tool counted, None if it counted nothing, and the first of its words.

    Where it finds nothing wrong, or stopped before, these are the last words that were printed.
    """
    counted = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    errors = int(counted[1]) if counted else None
    lines = [line for line in printed.splitlines() if line.strip() and "SUMMARY" not in line]
    said = [line for line in lines if line.startswith("=========")][1:4] if errors else lines[-1:]
    return errors, " ".join(said)[:200]


def _ended(
    command: list[str], kit: Kit, more: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess | None:
    """Returns what became of a command in an environment with `more` variables, None if it did not end in time."""
    around = {"env": {**os.environ, **more}, "timeout": max(1.0, kit.seconds_left)}
    try:
        return subprocess.run(command, capture_output=True, text=True, **around)
    except subprocess.TimeoutExpired:
        return None
