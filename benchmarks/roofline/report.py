"""What was counted, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import GIB

from .counter import Counts
from .gpus import Gpu
from .head import HeadCase

_GB = 1e9
HEAD_COLUMNS = (
    "N/H/V",
    "floor ms",
    "ours ms",
    "× floor",
    "TRL ms",
    "TRL / ours",
    "GB ours",
    "GB TRL",
    "passes",
    "launches",
    "waits",
    "peak GiB",
)


def roofline_of(gpu: Gpu) -> str:
    """The roofline in one line."""
    return (
        f"{gpu.name}: {gpu.products / 1e12:.0f} TFLOP/s of 16-bit products, {gpu.memory / 1e12:.1f} TB/s. "
        "Every ms is an ESTIMATE: counted FLOPs and bytes one after the other, nothing measured on a GPU."
    )


def head_tables(cases: Sequence[HeadCase]) -> list[Table]:
    """A table a mode. Pairs of numbers are ours and TRL's."""
    tables = []
    for mode in dict.fromkeys(case.mode for case in cases):
        table = Table(title=f"Head, {mode}: ms are estimates; passes, launches, waits and peaks are ours | TRL's")
        for column in HEAD_COLUMNS:
            table.add_column(column, justify="right")
        for case in cases:
            if case.mode == mode:
                table.add_row(*_head_row(case))
        tables.append(table)
    return tables


def _head_row(case: HeadCase) -> list[str]:
    pass_flops = case.floor_flops / case.passes
    return [
        str(case.size),
        f"{case.floor:.1f}",
        f"{case.our_milliseconds:.1f}",
        f"{case.over_floor:.2f}",
        f"{case.trl_milliseconds:.1f}",
        f"{case.trl_over_ours:.2f}",
        f"{case.ours.moved / _GB:.1f}",
        f"{case.trl.moved / _GB:.1f}",
        f"{case.ours.flops / pass_flops:.2f} | {case.trl.flops / pass_flops:.2f}",
        f"{case.ours.launches} | {case.trl.launches}",
        f"{case.ours.waits.total()} | {case.trl.waits.total()}",
        f"{case.ours.peak_bytes / GIB:.2f} | {case.trl.peak_bytes / GIB:.2f}",
    ]


def operator_table(title: str, counts: Counts, rows: int = 15) -> Table:
    """The operators that move most bytes."""
    table = Table(title=title)
    for column in ("operator", "launches", "TFLOP", "GB read", "GB written"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, tally in sorted(counts.by_operator.items(), key=lambda item: -item[1].moved)[:rows]:
        numbers = (f"{tally.flops / 1e12:.2f}", f"{tally.read / _GB:.3f}", f"{tally.written / _GB:.3f}")
        table.add_row(name, str(tally.calls), *numbers)
    return table


def head_facts(case: HeadCase) -> dict[str, Any]:
    """A case of the head for JSON; milliseconds are estimates."""
    return {
        "what": "head",
        "mode": case.mode,
        **case.size._asdict(),
        "gpu": case.gpu.name,
        "estimated_floor_ms": case.floor,
        "ours": counts_facts(case.ours, case.gpu),
        "trl": counts_facts(case.trl, case.gpu),
    }


def counts_facts(counts: Counts, gpu: Gpu) -> dict[str, Any]:
    """Counts for JSON."""
    return {
        "estimated_ms": counts.milliseconds(gpu),
        "flops": counts.flops,
        "bytes_read": counts.read,
        "bytes_written": counts.written,
        "bytes_of_given_factors": counts.factors,
        "launches": counts.launches,
        "host_waits": dict(counts.waits),
        "peak_extra_bytes": counts.peak_bytes,
        "operators": {name: vars(tally) for name, tally in counts.by_operator.items()},
    }


def print_head(console: Console, cases: Sequence[HeadCase], operators: bool) -> None:
    """The head's tables; operators: with what each case consists of."""
    for table in head_tables(cases):
        console.print(table)
    for case in cases if operators else ():
        for whose, counts in (("ours", case.ours), ("TRL 1.16", case.trl)):
            console.print(operator_table(f"{case.mode} at {case.size}, {whose}", counts))
