"""Reports what was counted, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.memory import GIB
from trl_fast.planning.gpu_facts import Gpu
from trl_fast.planning.model_shapes import model_config
from trl_fast.planning.report import wire_line
from trl_fast.planning.step_times import planned_wire
from trl_fast.planning.training_setup import TrainingSetup

from .head import HeadCase
from .operator_counter import Counts
from .steps import StepCase

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
    """Returns the roofline in one line."""
    return (
        f"{gpu.name}: {gpu.products / 1e12:.0f} TFLOP/s of 16-bit products, {gpu.memory / 1e12:.1f} TB/s. "
        "Every ms is an ESTIMATE: counted FLOPs and bytes one after the other, nothing measured on a GPU."
    )


def head_tables(cases: Sequence[HeadCase]) -> list[Table]:
    """Returns a table for each mode. Pairs of numbers are ours and TRL's."""
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


STEP_COLUMNS = (
    "step",
    "ours ms",
    "TRL ms",
    "TRL / ours",
    "plain ms",
    "elementwise GB",
    "TFLOP",
    "GB",
    "launches",
    "waits",
    "peak GiB",
)


def step_table(cases: Sequence[StepCase]) -> Table:
    """Returns a table with a row for each step."""
    title = "Optimizer steps: ms are estimates; pairs are ours | TRL's; plain: ours without fused layers"
    table = Table(title=f"{title}; elementwise: ours | plain | TRL's")
    for column in STEP_COLUMNS:
        table.add_column(column, justify="left" if column == "step" else "right")
    for case in cases:
        pair = (case.ours, case.trl)
        table.add_row(
            f"{case.step}, {case.shape.batch} × ({case.shape.prompt} + {case.shape.completion})",
            *(f"{counts.milliseconds(case.gpu):.0f}" for counts in pair),
            f"{case.trl_over_ours:.2f}",
            f"{case.plain.milliseconds(case.gpu):.0f}",
            " | ".join(f"{counts.elementwise / _GB:.1f}" for counts in (case.ours, case.plain, case.trl)),
            " | ".join(f"{counts.flops / 1e12:.0f}" for counts in pair),
            " | ".join(f"{counts.moved / _GB:.0f}" for counts in pair),
            " | ".join(str(counts.launches) for counts in pair),
            " | ".join(str(counts.waits.total()) for counts in pair),
            " | ".join(f"{counts.peak_bytes / GIB:.1f}" for counts in pair),
        )
    return table


def wire_of_step(case: StepCase, engine: str, num_gpus: int) -> str:
    """Says what each of so many GPUs sends over the wire in a step, by the plan of that engine."""
    length = case.shape.prompt + case.shape.completion
    setup = TrainingSetup(
        model_config(case.step.model),
        method=case.step.method,
        lora_r=case.step.lora_r,
        lora_target_modules=None if case.step.lora_r is None else "all-linear",
        per_device_train_batch_size=case.shape.batch,
        max_length=length,
        num_gpus=num_gpus,
        engine=engine,
    )
    return wire_line(planned_wire(setup, length), setup, case.gpu)


def step_facts(case: StepCase) -> dict[str, Any]:
    """Returns a step for JSON; milliseconds are estimates."""
    return {
        "what": "step",
        "method": case.step.method,
        "model": case.step.model,
        "lora_r": case.step.lora_r,
        **vars(case.shape),
        "gpu": case.gpu.name,
        "ours": counts_facts(case.ours, case.gpu),
        "ours_without_fused_layers": counts_facts(case.plain, case.gpu),
        "trl": counts_facts(case.trl, case.gpu),
    }


def operator_table(title: str, counts: Counts, rows: int = 15) -> Table:
    """Returns the operators that move most bytes."""
    table = Table(title=title)
    for column in ("operator", "launches", "TFLOP", "GB read", "GB written"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for name, tally in sorted(counts.by_operator.items(), key=lambda item: -item[1].moved)[:rows]:
        numbers = (f"{tally.flops / 1e12:.2f}", f"{tally.read / _GB:.3f}", f"{tally.written / _GB:.3f}")
        table.add_row(name, str(tally.calls), *numbers)
    return table


def head_facts(case: HeadCase) -> dict[str, Any]:
    """Returns a case of the head for JSON; milliseconds are estimates."""
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
        "elementwise_bytes": counts.elementwise,
        "launches": counts.launches,
        "host_waits": dict(counts.waits),
        "peak_extra_bytes": counts.peak_bytes,
        "operators": {name: vars(tally) for name, tally in counts.by_operator.items()},
    }


def print_cases(
    console: Console, heads: Sequence[HeadCase], steps: Sequence[StepCase], *, operators: bool, waits: bool
) -> None:
    """Prints the tables; operators: with what each case consists of; waits: with where the host waits."""
    for table in (*head_tables(heads), *([step_table(steps)] if steps else [])):
        console.print(table)
    for case in (*heads, *steps):
        for whose, counts in (("ours", case.ours), ("TRL 1.16", case.trl)):
            if operators:
                console.print(operator_table(f"{case.name}, {whose}", counts))
            if waits and counts.waits:
                console.print(f"{case.name}, {whose}, waits at:")
                console.print("\n".join(f"  {count} × {place}" for place, count in counts.waits.most_common()))
