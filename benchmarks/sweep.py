"""Times the loss head over a sweep of sizes, against its floor and its peers.

    python -m benchmarks.sweep [--points N8192 fp32] [--resume] [--quick] [--report]

The points are a star: one size, and from there one dimension at a time. (The arm of H is at a smaller vocabulary,
which many models of that width have.) At each, for a trained head, a frozen head and scoring without gradient: the
contenders in turns, medians with min and max, peak memory. A peer that would not fit memory or would take longer than
--limit is not run, and the reason stands in its place; TRL with a trained head is always run.

Every point's figures are written when it is done. A plain run starts anew; --points runs those points (again) and
keeps the others; --resume runs what is missing. Plots lie beside the figures, and the table in docs/benchmarks.md is
made of them; --report does only that.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from rich.console import Console

from .head_problem import Problem, make_problem
from .linear_logprob import (
    BY_TOKEN,
    MODES,
    PLAIN,
    TRL,
    contenders,
    our_backends,
    peers,
    report,
)
from .machine_info import describe_machine
from .memory import GIB
from .sweep_report import plot_all, split_docs, write_docs
from .timing import first_seconds, race

ROOT = Path(__file__).parents[1]
FIGURES, DOCS = ROOT / "benchmarks/results/sweep.json", ROOT / "docs/benchmarks.md"
# Ignored by git, and no document is made of it.
QUICK_FIGURES = ROOT / "runs/sweep/quick.json"

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A peer is timed on so many rows and columns to know how long the whole would take.
PROBE_ROWS, PROBE_VOCAB = 128, 2048
# Logits, float32 log-probs and the gradients of both.
PLAIN_BYTES_A_LOGIT = 16


class Point(NamedTuple):
    """Holds one problem: N rows, H hidden, V vocabulary."""

    rows: int
    hidden: int
    vocab: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"N{self.rows}-H{self.hidden}-V{self.vocab}-{self.dtype}"

    @classmethod
    def of_name(cls, name: str) -> Point | None:
        """Returns the point of a full name; None if it is none."""
        found = re.fullmatch(rf"N([1-9]\d*)-H([1-9]\d*)-V([1-9]\d*)-({'|'.join(DTYPES)})", name)
        return cls(*map(int, found.groups()[:3]), found[4]) if found else None


POINTS = (
    Point(1024, 896, 151936),
    Point(256, 896, 151936),
    Point(8192, 896, 151936),
    Point(1024, 896, 32768),
    Point(1024, 896, 262144),
    Point(1024, 576, 32768),
    Point(1024, 2048, 32768),
    Point(1024, 4096, 32768),
    Point(1024, 896, 151936, "fp32"),
    # Small enough for every peer.
    Point(256, 576, 32768),
    Point(256, 576, 32768, "fp32"),
)
QUICK_POINTS = (Point(64, 256, 16384), Point(256, 256, 16384), Point(256, 256, 16384, "fp32"))


def select_points(words: Sequence[str], points: Sequence[Point]) -> list[Point]:
    """Returns points by full names, or those of `points` whose names contain a word; all without a word.

    Raises:
        ValueError: a word is neither.
    """
    if not words:
        return list(points)
    chosen = []
    for word in words:
        named = Point.of_name(word)
        found = [named] if named else [point for point in points if word in point.name.split("-")]
        if not found:
            raise ValueError(
                f"points: {word!r} is neither a full name such as N512-H896-V32768-bf16 nor a part of one of "
                f"{', '.join(point.name for point in points)}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def duration(seconds: float) -> str:
    """Tells a duration in round words, for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def estimated_seconds(name: str, problem: Problem, mode: str) -> float:
    """Estimates a peer's time for the whole problem from a small part of it: rows times vocabulary counts."""
    (rows, vocab), device = (problem.hidden.shape[0], problem.weight.shape[0]), problem.hidden.device
    part = problem.part(PROBE_ROWS, PROBE_VOCAB)
    seconds = first_seconds(peers(part.for_mode(mode), mode)[name], device)
    return seconds * rows * vocab / (part.hidden.shape[0] * part.weight.shape[0])


def why_not(name: str, problem: Problem, mode: str, limit: float) -> str | None:
    """Tells why a peer should not be run on this problem, or None; `limit` in seconds."""
    if name == PLAIN:
        needed = PLAIN_BYTES_A_LOGIT * problem.hidden.shape[0] * problem.weight.shape[0]
        if needed > psutil.virtual_memory().available // 2:
            return f"would need about {needed / GIB:.0f} GiB"
    if name == TRL and mode == "trained":
        return None
    seconds = estimated_seconds(name, problem, mode)
    return f"would take about {duration(seconds)}" if seconds > limit else None


def measure(point: Point, rounds: int, patience: float, limit: float, console: Console) -> dict:
    """Measures one point in every mode; returns the figures as they are written down."""
    problem = make_problem(point.rows, point.hidden, point.vocab, DTYPES[point.dtype], torch.device("cpu"))
    others = {f"{ours}, {backend}" for backend in our_backends(problem)[1:] for ours in ("ours", BY_TOKEN)}
    figures = []
    for mode in MODES:
        reasons = {name: why_not(name, problem, mode, limit) for name in peers(problem, mode)}
        skipped = {name: reason for name, reason in reasons.items() if reason}
        raced = contenders(problem, mode, others | skipped.keys(), by_token=True)
        race(raced, rounds, patience, problem.hidden.device, mode)
        figures += report(console, mode, raced)
        for name, reason in skipped.items():
            figures.append({"mode": mode, "name": name, "not_run": reason})
            console.print(f"{name}: not run, {reason}")
    tried = {
        product: {str(layout): seconds for layout, seconds in layouts.items()}
        for product, layouts in problem.floor.tried.items()
    }
    return {**point._asdict(), "rounds": rounds, "floor_layouts": tried, "figures": figures}


def load_results(path: Path, machine: dict) -> dict:
    """Returns the results written there, or empty ones.

    Raises:
        ValueError: they were measured on another machine.
    """
    if not path.exists():
        return {"machine": machine, "points": {}}
    results = json.loads(path.read_text())
    for field, value in machine.items():
        if results["machine"].get(field) != value:
            raise ValueError(
                f"{path} was measured with {field}={results['machine'].get(field)!r}, and here it is {value!r}; "
                "start anew (without --resume and --points), or write elsewhere (--json)"
            )
    return results


def save_results(path: Path, results: dict) -> None:
    """Writes them whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="+", default=[], help="full names (N512-H896-V32768-bf16) or parts (N8192)")
    parser.add_argument("--resume", action="store_true", help="run only what the figures lack")
    parser.add_argument("--quick", action="store_true", help="small points, one round, figures under runs/, no table")
    parser.add_argument("--report", action="store_true", help="run nothing, make plots and table of the figures")
    parser.add_argument("--rounds", type=int, help="default 3, quick 1")
    parser.add_argument("--patience", type=float, default=8.0, help="seconds; slower contenders run only once")
    parser.add_argument("--limit", type=float, help="seconds; slower peers do not run (default 60, quick 5)")
    parser.add_argument("--json", type=Path, help="where the figures are, default benchmarks/results/sweep.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the table goes")
    arguments = parser.parse_args()
    arguments.json = arguments.json or (QUICK_FIGURES if arguments.quick else FIGURES)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.limit = arguments.limit or (5.0 if arguments.quick else 60.0)
    return arguments


def plan(arguments: argparse.Namespace) -> tuple[dict, list[Point]]:
    """Returns the results to add to, and the points to run.

    Raises:
        ValueError: an unknown point, or results of another machine.
    """
    chosen = select_points(arguments.points, QUICK_POINTS if arguments.quick else POINTS)
    machine = describe_machine()
    kept = arguments.resume or arguments.points
    results = load_results(arguments.json, machine) if kept else {"machine": machine, "points": {}}
    return results, [point for point in chosen if not (arguments.resume and point.name in results["points"])]


def main() -> int:
    arguments = parse_arguments()
    console = Console(width=max(110, Console().width))
    try:
        if not arguments.quick:
            split_docs(arguments.docs)
        results, missing = (json.loads(arguments.json.read_text()), []) if arguments.report else plan(arguments)
    except (ValueError, FileNotFoundError) as error:
        console.print(f"[red]error:[/] {error}", soft_wrap=True)
        return 2
    for number, point in enumerate(missing, 1):
        console.rule(f"{number} of {len(missing)}: {point.name}")
        results["points"][point.name] = measure(point, arguments.rounds, arguments.patience, arguments.limit, console)
        save_results(arguments.json, results)
    plots = plot_all(results, arguments.json)
    if not arguments.quick:
        write_docs(results, plots, arguments.docs)
    console.print(f"figures: {arguments.json}; plots: {', '.join(plot.name for plot in plots)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
