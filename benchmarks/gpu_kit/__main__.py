"""Supervises the phases: starts each as a process, gives it the GPU when its turn comes, ends it at its deadline.

This process never touches CUDA. The phases' processes are started ahead, and have what they import by their turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from .facts import Facts, default_path, read_facts
from .plan import PLANS, Phase
from .summary import print_summary

# Seconds between a phase's deadline, which it knows, and its end by force.
GRACE = 10.0
# Seconds that are kept for the summary.
RESERVE = 5.0


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=150 if arguments.device == "cuda" else None)
    if arguments.device == "cuda" and not Path("/dev/nvidia0").exists() and shutil.which("nvidia-smi") is None:
        console.print("There is no NVIDIA GPU here: nothing was run, and nothing is claimed.")
        return 0
    arguments.facts.parent.mkdir(parents=True, exist_ok=True)
    arguments.facts.unlink(missing_ok=True)
    phases = [phase for phase in PLANS[arguments.plan] if not arguments.phases or phase.module in arguments.phases]
    run_phases(phases, arguments, console)
    print_summary(console, read_facts(arguments.facts))
    return 0


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kit", description="Everything that needs a GPU.")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all phases together")
    parser.add_argument("--plan", choices=sorted(PLANS), default="first")
    parser.add_argument("--phases", nargs="+", help="only these, by the names of their modules")
    parser.add_argument("--facts", type=Path, default=default_path(), help="JSON lines, written anew")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal")
    arguments = parser.parse_args(words)
    if arguments.seconds <= RESERVE:
        parser.error(f"--seconds {arguments.seconds:g}: expected more than {RESERVE:g}")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: only a rehearsal, with --tiny")
    return arguments


def run_phases(phases: list[Phase], arguments: argparse.Namespace, console: Console) -> None:
    """Runs the phases one after the other within the time; what did not fit is among the facts."""
    end = time.monotonic() + arguments.seconds - RESERVE
    ahead = max(2, (os.cpu_count() or 2) // 2)
    running: list[subprocess.Popen] = []
    with arguments.facts.with_suffix(".log").open("w") as log:
        for number, phase in enumerate(phases):
            running += [start(phase, arguments, log) for phase in phases[len(running) : number + ahead]]
            left = end - time.monotonic()
            if left < phase.least:
                Facts(arguments.facts, phase.name).skip("phase", f"{left:.0f} s left, it needs {phase.least:g}")
                running[number].kill()
                continue
            begun = time.monotonic()
            how = give_turn(running[number], min(left, phase.seconds))
            took = time.monotonic() - begun
            console.print(f"{phase.name}: {how} in {took:.0f} s", markup=False)
            Facts(arguments.facts, phase.name).add("phase", how=how, seconds=took)


def start(phase: Phase, arguments: argparse.Namespace, log: object) -> subprocess.Popen:
    """A phase's process, which imports what it needs and then waits for its turn."""
    words = ["--facts", str(arguments.facts), "--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    command = [sys.executable, "-m", "benchmarks.gpu_kit.worker", phase.name, phase.module, *words]
    # A phase's memory is its own; blocks of any size serve one another.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1", **os.environ}
    keywords = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "text": True, "env": environment}
    return subprocess.Popen([*command, *phase.arguments], **keywords)


def give_turn(process: subprocess.Popen, seconds: float) -> str:
    """Lets a process run for so long; how it ended."""
    try:
        process.stdin.write(f"{seconds}\n")
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        code = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "ended by force at its deadline"
    return "done" if code == 0 else f"failed with exit code {code}"


if __name__ == "__main__":
    sys.exit(main())
