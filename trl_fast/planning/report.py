"""Shows what a plan says: tables for the terminal and a plot over time."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from .comparisons import Row
from .gpu_facts import GPUS, GPUS_OF_A_MACHINE, Gpu
from .memory_sizes import GIB, gib
from .memory_timeline import (
    ATTENTION,
    GATHERED,
    GRADIENTS,
    HEAD,
    IMAGES,
    KINDS,
    KV_CACHE,
    MEANINGS,
    OPTIMIZER,
    REFERENCE,
    SAVED,
    WEIGHTS,
    WORKSPACE,
    Peak,
    Timeline,
)
from .peak_estimates import Longest, StagePeaks
from .planned_methods import PLANNED
from .roofline.work import Work
from .sharding import sharing_of
from .training_setup import SAMPLING_TOGETHER, TEACHER_METHODS, TOLD_METHODS, TrainingSetup
from .wire import Wire

_COLORS = {
    WEIGHTS: "#4c566a",
    GATHERED: "#6c7a96",
    IMAGES: "#ccb8a4",
    REFERENCE: "#8d99ae",
    OPTIMIZER: "#b48ead",
    GRADIENTS: "#d08770",
    SAVED: "#5e81ac",
    KV_CACHE: "#bf616a",
    ATTENTION: "#ebcb8b",
    HEAD: "#a3be8c",
    WORKSPACE: "#88c0d0",
}
# Most points of a plotted line.
_POINTS = 2000


def peak_table(peak: Peak, title: str) -> Table:
    """Makes a table of what a peak consists of."""
    table = Table(title=title, title_justify="left")
    table.add_column("memory")
    table.add_column("GiB", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what it is")
    for kind in KINDS:
        size = peak.parts[kind]
        if size:
            table.add_row(kind, gib(size), f"{size / peak.bytes:.0%}", MEANINGS[kind])
    table.add_section()
    table.add_row("peak", gib(peak.bytes), "", f"in the stage: {peak.stage}")
    return table


def stages_table(peaks: StagePeaks) -> Table:
    """Makes a table of the peak of each stage of a step."""
    table = Table(title="Peak by stage of the step", title_justify="left")
    table.add_column("stage")
    table.add_column("GiB", justify="right")
    for stage, peak in peaks.items():
        table.add_row(stage, gib(peak.bytes))
    return table


def verdict(peak: Peak, limit: int | None, gpu: Gpu | None) -> str:
    """Says in one line whether a step fits, and by how much; without a limit, which GPUs of the table it fits."""
    if limit is None:
        return f"Needs {gib(peak.bytes)} GiB for tensors; {fitting_gpus(peak.bytes)}."
    where = "gpu_memory" if gpu is None else gpu.name
    difference = f"{gib(abs(limit - peak.bytes))} GiB {'to spare' if peak.bytes <= limit else 'too much'}"
    fits = "Fits" if peak.bytes <= limit else "Does not fit"
    return f"{fits} {where}: {gib(peak.bytes)} of {gib(limit)} GiB for tensors, {difference}."


def fitting_gpus(size: int) -> str:
    """Lists the GPUs of the table that hold `size` bytes of tensors, the smallest first."""
    fit = [
        name for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory_bytes) if size <= gpu.usable_bytes
    ]
    if not fit:
        return "no GPU of the table (--gpu) holds that"
    return f"fits {', '.join(fit[:3])}{' and larger ones' if len(fit) > 3 else ''}"


def remedies(rows: list[Row], limit: int) -> str:
    """Names the changed settings with which a step fits that does not fit as planned, the one with most room first."""
    if len(rows) == 1:
        return "Leave --compare false out to see which settings make it fit."
    fit = sorted((row for row in rows[1:] if row.peak.bytes <= limit), key=lambda row: row.peak.bytes)
    if not fit:
        return "No single switch makes it fit: take a larger GPU, more of them (--num_gpus), or a smaller model."
    return f"Fits with {' or '.join(f'{row.name} ({gib(row.peak.bytes)} GiB)' for row in fit[:3])}."


def step_time(work: Work, gpu: Gpu) -> str:
    """Says how long a step takes by the roofline, and what makes it take so long."""
    bounds = work.bounds(gpu)
    bound = max(bounds, key=lambda name: bounds[name])
    others = ", ".join(f"{name} {seconds(size)}" for name, size in bounds.items() if name != bound and size)
    return f"Estimated time of a step there: {seconds(bounds[bound])}, bound by {bound} ({others})."


def wire_line(wire: Wire, setup: TrainingSetup, gpu: Gpu | None) -> str:
    """Says what a rank sends over the wire in a step, and over which."""
    named = {item.name.replace("_", "-"): getattr(wire, item.name) for item in fields(wire)}
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in named.items() if size)
    said = f"On the wire: {wire.bytes / 1e9:.2f} GB that each GPU sends in a step ({parts})"
    if gpu is None:
        return f"{said}."
    if setup.num_gpus > GPUS_OF_A_MACHINE:
        return f"{said}, over InfiniBand at {gpu.network_bytes_per_second / 1e9:.0f} GB/s."
    link = "NVLink" if gpu.nvlink else "PCIe"
    return f"{said}, over {link} at {gpu.link_bytes_per_second / 1e9:.0f} GB/s."


def seconds(size: float) -> str:
    """Writes a time with two or three digits."""
    return f"{1e3 * size:.0f} ms" if size < 1 else f"{size:.2f} s" if size < 10 else f"{size:.0f} s"


def rows_table(rows: list[Row], title: str, max_length: int, gpu: Gpu | None = None) -> Table:
    """Makes a table of setups against the first one: peaks at `max_length`, longest contexts, times on a GPU."""
    base = rows[0]
    searched = base.longest is not None
    table = Table(title=f"{title}, sequences of {max_length:,} tokens", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("GiB", justify="right")
    if not searched:
        table.add_column("more", justify="right")
    if searched:
        table.add_column("context", justify="right")
        table.add_column("", justify="right")
    if gpu is not None:
        table.add_column("a step", justify="right")
        table.add_column("", justify="right")
    for row in rows:
        difference = "" if row is base else f"{(row.peak.bytes - base.peak.bytes) / GIB:+.2f}"
        cells = [row.name, gib(row.peak.bytes), *([] if searched else [difference])]
        if searched:
            cells += [tokens(row.longest), _ratio(row, base)]
        if gpu is not None:
            taken, first = row.work.seconds(gpu), base.work.seconds(gpu)
            cells += [seconds(taken), "" if row is base else f"{taken / first:.2f}×"]
        table.add_row(*cells)
    return table


def tokens(longest: Longest) -> str:
    """Writes a longest context for people."""
    if not longest.max_length:
        return "none fits"
    return f"{'≥ ' if longest.at_least else ''}{longest.max_length:,}"


def _ratio(row: Row, base: Row) -> str:
    if row is base or not base.longest.max_length or not row.longest.max_length:
        return ""
    return f"{row.longest.max_length / base.longest.max_length:.2f}×"


def save_plot(path: Path, timeline: Timeline, title: str, limit: int | None) -> None:
    """Draws memory over a step by what it holds; a dashed line at `limit` bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5.5))
    operators, levels = _thinned(timeline)
    shown = [number for number in range(len(KINDS)) if levels[number].any()]
    axes.stackplot(
        operators,
        levels[shown] / GIB,
        labels=[KINDS[number] for number in shown],
        colors=[_COLORS[KINDS[number]] for number in shown],
        step="post",
    )
    # A limit far above would flatten everything.
    most = levels.sum(axis=0).max()
    top = (limit if limit is not None and most < limit < 2 * most else most) / GIB * 1.15
    if limit is not None:
        axes.axhline(limit / GIB, color="tab:red", linestyle="--", linewidth=1, label=f"gpu_memory {gib(limit)} GiB")
    _mark_stages(axes, timeline, top)
    axes.set(title=title, xlabel="operators of the step, in order", ylabel="GiB")
    axes.set(xlim=(0, operators[-1]), ylim=(0, top))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def _thinned(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Returns operators (points,) and levels (kinds, points): of each stretch the operator with the most memory."""
    total = timeline.levels.sum(axis=0)
    stretch = max(1, -(-len(total) // _POINTS))
    firsts = range(0, len(total), stretch)
    chosen = [start + int(total[start : start + stretch].argmax()) for start in firsts]
    return np.array(chosen), timeline.levels[:, chosen]


def _mark_stages(axes: object, timeline: Timeline, top: float) -> None:
    width = timeline.levels.shape[1]
    for name, start, end in timeline.stages:
        if end < start:
            continue
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.4)
        if end - start > 0.02 * width:
            place = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 8}
            axes.text((start + end) / 2, 0.98 * top, name, **place)


def teacher_line(setup: TrainingSetup, name: str | None) -> str:
    """Says which teacher is planned. name: its own, None where none is given."""
    if setup.teacher is None or name is None:
        return "No teacher is named (teacher_model_name_or_path): one as large as the student is planned."
    return f"Teacher: {name}, {setup.teacher.dtype} weights."


def _samples_together(setup: TrainingSetup) -> bool:
    return setup.method in SAMPLING_TOGETHER and (
        setup.generates or setup.method not in (*TEACHER_METHODS, *TOLD_METHODS)
    )


def setup_line(setup: TrainingSetup) -> str:
    """Describes the planned run in one line, without the model's name."""
    what = "all weights" if setup.lora_r is None else f"LoRA r={setup.lora_r}"
    stored = f"{setup.dtype} weights" if setup.quantization is None else f"weights in {setup.quantization}"
    precision = stored + (", bf16 autocast" if setup.bf16 else "")
    count = setup.per_device_train_batch_size
    unit = PLANNED[setup.method].unit + "s" * (count > 1)
    sampled = f", {setup.completions_per_generation} sampled at a time" if _samples_together(setup) else ""
    devices = f", shared by {setup.num_gpus} GPUs ({sharing_of(setup).title})" if setup.num_gpus > 1 else ""
    where = ", on a CPU" if setup.device == "cpu" else ""
    size = f"{count} {unit} of {setup.max_length:,} tokens"
    if setup.images:
        number = len(setup.images)
        size += f", {setup.image_tokens:,} of {number} image{'s' * (number > 1)}"
    return f"{setup.method}, {what}, {precision}, {size}{sampled}{devices}{where}"
