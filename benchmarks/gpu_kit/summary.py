"""Prints the facts that matter most as tables of milliseconds, at most 10,000 characters in all."""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .facts import read_facts

MOST_CHARACTERS = 10_000
GIB = 1 << 30


def print_summary(console: Console, facts: list[dict]) -> None:
    """Prints failures first, then the head's race, the ceilings, and the steps."""
    with console.capture() as captured:
        for part in (_machine, _wrong, _races, _steps, _long_rows, _tuning, _ceilings, _skipped):
            part(console, facts)
    console.out(captured.get()[:MOST_CHARACTERS], highlight=False)


def _machine(console: Console, facts: list[dict]) -> None:
    found = [fact for fact in facts if fact["phase"] == "environment"]
    words = [f"{fact['what']} {fact['version']}" for fact in found if "version" in fact]
    cards = [f"{fact['name']}, driver {fact['driver']}" for fact in found if fact["what"] == "card"]
    console.print(", ".join([*cards, *words]), markup=False)
    for fact in found:
        if fact["what"].startswith("backend") and not fact["serves"]:
            console.print(f"{fact['what']}: {fact['reason']}", markup=False)


def _wrong(console: Console, facts: list[dict]) -> None:
    for fact in facts:
        if fact["what"].startswith("WRONG"):
            console.print(f"{fact['what']}: {fact['error']:.1e} > {fact['allowed']:.0e}"[:300], markup=False)
        elif fact["what"].startswith("check "):
            console.print(f"{fact['what']}: {fact['right']} right, {fact['wrong']} wrong", markup=False)


def _races(console: Console, facts: list[dict]) -> None:
    """Returns a table: a line a contender, a column a size: milliseconds, over the floor, over ours."""
    times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for fact in facts:
        if fact["phase"] in ("heads", "divergences") and "ms" in fact:
            mode, name = fact["what"].split(": ", 1)
            times[mode, name][fact["size"]] = fact["ms"]
    sizes = list(dict.fromkeys(size for row in times.values() for size in row))
    if not times:
        return
    table = Table(title="the head: ms (× floor; TRL is slower by)")
    for column in ("mode", "", *sizes):
        table.add_column(column)
    for (mode, name), row in times.items():
        floor, trl = times.get((mode, "floor"), {}), times.get((mode, "TRL"), {})
        cells = []
        for size in sizes:
            if size not in row:
                cells.append("-")
                continue
            over = f"{row[size] / floor[size]:.2f}" if size in floor else "-"
            slower = f"{trl[size] / row[size]:.2f}" if size in trl else "-"
            cells.append(f"{row[size]:.1f} ({over}; {slower})")
        table.add_row(mode, name, *cells)
    console.print(table)


def _steps(console: Console, facts: list[dict]) -> None:
    found = [fact for fact in facts if fact["phase"].startswith("step") and "ms" in fact]
    if not found:
        return
    busy = {fact["phase"]: fact for fact in facts if "busy_share" in fact}
    table = Table(title="steps")
    for column in ("", "ms", "tokens/s", "peak GiB", "busy", "launches", "losses"):
        table.add_column(column)
    for fact in found:
        profile = busy.get(fact["phase"], {})
        table.add_row(
            fact["phase"].removeprefix("step "),
            f"{fact['ms']:.1f}",
            f"{fact['tokens_per_second']:.0f}",
            f"{fact['peak_bytes'] / GIB:.2f}",
            f"{profile['busy_share']:.2f}" if profile else "-",
            f"{profile['launches']}" if profile else "-",
            " ".join(f"{loss:.4f}" for loss in fact["losses"][:3]),
        )
    console.print(table)


def _long_rows(console: Console, facts: list[dict]) -> None:
    for fact in facts:
        if "predicted_bytes" in fact and "peak_bytes" in fact:
            peaks = f"peak {fact['peak_bytes'] / GIB:.2f} GiB, planned {fact['predicted_bytes'] / GIB:.2f}"
            console.print(f"{fact['what']}: {peaks}, {fact['ms']:.0f} ms", markup=False)


def _tuning(console: Console, facts: list[dict]) -> None:
    """Returns the three fastest configurations of the fused kernel at each size, and the row kernels."""
    found = [fact for fact in facts if fact["phase"] == "tuning" and "ms" in fact]
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for fact in found:
        if "tiles" in fact:
            groups[fact["size"], fact["keep"]].append(fact)
        else:
            console.print(f"{fact['what']}: {fact['ms']:.2f} ms, {fact['gb_per_s']:.0f} GB/s", markup=False)
    for (size, keep), group in groups.items():
        best = sorted(group, key=lambda fact: fact["ms"])[:3]
        words = ", ".join(f"{fact['ms']:.2f} ms {fact['tiles']}" for fact in best)
        console.print(f"fused kernel at {size}{', kept' * keep}: {words}", markup=False)


def _ceilings(console: Console, facts: list[dict]) -> None:
    for fact in facts:
        if fact["phase"] == "ceilings" and "ms" in fact:
            rate = f"{fact['gb_per_s']:.0f} GB/s" if "gb_per_s" in fact else f"{fact['tflops']:.0f} TFLOP/s"
            console.print(f"{fact.get('size', '')} {fact['what']}: {fact['ms']:.2f} ms, {rate}", markup=False)


def _skipped(console: Console, facts: list[dict]) -> None:
    for fact in facts:
        if "skipped" in fact:
            console.print(f"left out: {fact['phase']}, {fact['what']}: {fact['skipped']}"[:200], markup=False)


def main() -> None:
    """Prints the tables of a file of facts; with --page, writes them to a page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("facts", type=Path)
    parser.add_argument("--page", type=Path, help="a Markdown file, written anew")
    arguments = parser.parse_args()
    facts = read_facts(arguments.facts)
    print_summary(Console(width=150), facts)
    if arguments.page:
        text = io.StringIO()
        print_summary(Console(width=150, file=text), facts)
        cards = [fact["name"] for fact in facts if fact["what"] == "card"]
        title = f"# {cards[0] if cards else 'A rehearsal without a GPU'}"
        origin = f"Made from {arguments.facts.name} by `python -m benchmarks.gpu_kit.summary`; see benchmarks.md."
        arguments.page.write_text(f"{title}\n\n{origin}\n\n```\n{text.getvalue()}```\n")


if __name__ == "__main__":
    main()
