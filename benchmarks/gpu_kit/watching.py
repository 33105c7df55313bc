"""Lets the toolkit's own programs watch small calls: hardware counters of kernels, invalid accesses, races.

`ncu` and `compute-sanitizer` come with CUDA's toolkit; a machine without them is told of. Clocks are left as they are.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections import defaultdict

from .phase_context import Kit

METRICS = {
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "us": "gpu__time_duration.sum",
}
_KERNELS = "regex:row_|linear_scores|merge|nvjet"
CHECKS = (("memcheck", "kernels"), ("racecheck", "kernels"), ("memcheck", "losses"), ("memcheck", "attention"))
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
    lines = [line for line in (found or "").splitlines() if line.startswith('"')]
    if not lines:
        kit.facts.skip(what, (found or "it ran past its time").strip()[-200:])
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
    found = _ended([program, "--tool", tool, "--error-exitcode", "0", *_call(kit, name, "small")], kit)
    if found is None:
        kit.facts.skip(what, "it ran past its time")
        return
    words = [line for line in found.splitlines() if line.startswith("=========")]
    clean = any("ERROR SUMMARY: 0 errors" in line or "0 hazards" in line for line in words)
    if clean:
        kit.facts.add(f"check {what}", right=1, wrong=0)
    else:
        kit.facts.add(f"WRONG {what}: {' '.join(words[1:4])[:200]}", error=float("inf"), allowed=0.0)


def _ended(command: list[str], kit: Kit) -> str | None:
    """Returns all that a command printed, None if it did not end in time."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, kit.seconds_left))
    except subprocess.TimeoutExpired:
        return None
    return found.stdout + found.stderr
