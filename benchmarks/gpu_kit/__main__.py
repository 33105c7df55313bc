"""Supervises the phases: starts each as a process, gives it the GPU when its turn comes, ends it at its deadline.

This process never touches CUDA. The phases' processes are forked from one that has imported what they need, and are
started ahead, so that what a phase prepares without the GPU is done by its turn.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from .facts import Facts, default_path, read_facts
from .phase_worker import work
from .phases import PLANS, Phase
from .summary import print_summary

# Seconds between a phase's deadline, which it knows, and its end by force.
GRACE = 10.0
# Seconds that are kept for the summary.
RESERVE = 5.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Blocks of any size serve one another.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
PRELOADED = ["benchmarks.gpu_kit.preloaded_imports"]


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    console = Console(width=150)
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
    parser.add_argument("--plan", choices=sorted(PLANS), help="default: first, or rehearsal with --tiny")
    parser.add_argument("--phases", nargs="+", help="only these, by the names of their modules")
    parser.add_argument("--facts", type=Path, default=default_path(), help="JSON lines, written anew")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: a rehearsal")
    arguments = parser.parse_args(words)
    arguments.plan = arguments.plan or ("rehearsal" if arguments.tiny else "first")
    if arguments.seconds <= RESERVE:
        parser.error(f"--seconds {arguments.seconds:g}: expected more than {RESERVE:g}")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu: only a rehearsal, with --tiny")
    known = sorted({phase.module for phase in PLANS[arguments.plan]})
    for name in arguments.phases or ():
        if name not in known:
            parser.error(f"--phases {name}: unknown, expected some of {', '.join(known)}")
    return arguments


class Running(NamedTuple):
    """Holds a phase's process, and where it is told of its turn."""

    process: multiprocessing.process.BaseProcess
    turn: Connection


def run_phases(phases: list[Phase], arguments: argparse.Namespace, console: Console) -> None:
    """Runs the phases one after the other within the time; what did not fit is among the facts."""
    end = time.monotonic() + arguments.seconds - RESERVE
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ahead = max(2, (os.cpu_count() or 2) // 2)
    running: list[Running] = []
    for number, phase in enumerate(phases):
        running += [start(context, phase, arguments) for phase in phases[len(running) : number + ahead]]
        left = end - time.monotonic()
        if left < (0 if arguments.tiny else phase.least):
            Facts(arguments.facts, phase.name).skip("phase", f"{max(0.0, left):.0f} s left, it needs {phase.least:g}")
            running[number].process.kill()
            continue
        begun = time.monotonic()
        how = give_turn(running[number], max(0.0, min(left, phase.seconds)))
        took = time.monotonic() - begun
        console.print(f"{phase.name}: {how} in {took:.0f} s", markup=False)
        Facts(arguments.facts, phase.name).add("phase", how=how, seconds=took)


def start(context: multiprocessing.context.BaseContext, phase: Phase, arguments: argparse.Namespace) -> Running:
    """Starts a phase's process, which prepares and then waits for its turn."""
    here, there = context.Pipe()
    given = (phase.name, phase.module, phase.arguments, arguments.facts, arguments.device, arguments.tiny, there)
    process = context.Process(target=work, args=given, daemon=False)
    process.start()
    there.close()
    return Running(process, here)


def give_turn(running: Running, seconds: float) -> str:
    """Lets a process run for so long; how it ended."""
    with contextlib.suppress(BrokenPipeError):
        # What a process still prepares is of its time, so that it is told of a deadline and not of seconds.
        running.turn.send(time.monotonic() + seconds)
    running.process.join(seconds + GRACE)
    if running.process.is_alive():
        running.process.kill()
        running.process.join()
        return "ended by force at its deadline"
    return "done" if running.process.exitcode == 0 else f"failed with exit code {running.process.exitcode}"


if __name__ == "__main__":
    sys.exit(main())
