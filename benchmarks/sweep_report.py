"""Makes the table and the plots of a sweep of its written results (benchmarks/sweep.py) alone."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, NullLocator

from .linear_logprob import BY_TOKEN, CHUNKED, FLOOR, MODES, PLAIN, TRL
from .memory import MIB

BEGIN, END = "<!-- sweep -->", "<!-- /sweep -->"
OURS = "ours"
TITLES = {
    "trained": "Trained head, forward and backward",
    "frozen": "Frozen head, forward and backward",
    "scoring": "Scoring without gradient",
}
SHORT = {
    FLOOR: "floor",
    BY_TOKEN: "ours, a loss by token",
    TRL: TRL,
    PLAIN: "plain PyTorch",
    CHUNKED: "F.linear_cross_entropy",
}
COLOURS = {OURS: "tab:blue", BY_TOKEN: "tab:cyan", TRL: "tab:red", PLAIN: "tab:green", CHUNKED: "tab:purple"}
MARKERS = {OURS: "o", BY_TOKEN: "v", TRL: "s", PLAIN: "^", CHUNKED: "D"}


def by_name(point: dict, mode: str) -> dict[str, dict]:
    """Returns a point's figures in a mode, by contender; each of ours under one name, whatever the backend."""
    found = {}
    for figure in point["figures"]:
        if figure["mode"] == mode:
            name = figure["name"]
            found[name.partition(",")[0] if name.startswith(OURS) else name] = figure
    return found


def sorted_points(results: dict) -> list[dict]:
    return sorted(results["points"].values(), key=lambda p: (p["dtype"], p["hidden"], p["vocab"], p["rows"]))


def describe(machine: dict) -> str:
    """Returns one sentence that names the machine."""
    return (
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['isa']}, "
        f"{machine['threads']} threads, torch {machine['torch']}; products of bf16 tensors, ours and the floor's, run "
        f"in {machine['bf16_products']}."
    )


def time_cell(figure: dict) -> str:
    """Returns median seconds, with the range of the runs."""
    runs = figure["seconds"]
    spread = "1 run" if len(runs) == 1 else f"{min(runs):.2f}–{max(runs):.2f}"
    return f"{figure['median']:.2f} s ({spread})"


def cell(name: str, figures: dict[str, dict]) -> str:
    """Returns a contender's cell: its ratio, time and extra memory, or why it was not run."""
    figure = figures.get(name)
    if figure is None:
        return ""
    if "not_run" in figure:
        return f"not run: {figure['not_run']}"
    if name == FLOOR:
        return time_cell(figure)
    is_ours = name in (OURS, BY_TOKEN)
    base = "floor" if is_ours else OURS
    ratio = figure["over_floor"] if is_ours else figure["median"] / figures[OURS]["median"]
    return f"{ratio:.2f} × {base}, {time_cell(figure)}, {figure['extra_bytes'] / MIB:.0f} MiB"


def mode_table(results: dict, mode: str) -> str:
    """Returns a markdown table of every point in one mode."""
    points = sorted_points(results)
    present = {name for point in points for name in by_name(point, mode)}
    names = [name for name in (FLOOR, OURS, BY_TOKEN, TRL, PLAIN, CHUNKED) if name in present]
    lines = [["N", "H", "V", "dtype", *(SHORT.get(name, name) for name in names)]]
    lines.append(["--:", "--:", "--:", ":--", *[":--"] * len(names)])
    for point in points:
        figures = by_name(point, mode)
        size = [str(point[field]) for field in ("rows", "hidden", "vocab", "dtype")]
        lines.append(size + [cell(name, figures) for name in names])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(results: dict, plots: list[str]) -> str:
    """Returns everything between the markers; `plots` are paths as the document has to give them."""
    parts = [describe(results["machine"])]
    parts += [f"### {TITLES[mode]}\n\n{mode_table(results, mode)}" for mode in MODES]
    parts.append("\n".join(f"![{Path(plot).stem}]({plot})" for plot in plots))
    return "\n\n".join(parts)


def split_docs(path: Path) -> tuple[str, str]:
    """Returns the text before and after the markers.

    Raises:
        ValueError: the document lacks them.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"docs: {path} must have {BEGIN} and after it {END}, once each")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def write_docs(results: dict, plots: list[Path], path: Path) -> None:
    """Replaces what stands between the document's markers."""
    before, after = split_docs(path)
    links = [Path(os.path.relpath(plot, path.parent)).as_posix() for plot in plots]
    path.write_text(f"{before}{BEGIN}\n{section(results, links)}\n{END}{after}")


def rows_family(results: dict) -> list[dict]:
    """Returns the points that differ in N alone, as many as there are of one H, V and dtype, by rising N."""
    families = defaultdict(list)
    for point in sorted_points(results):
        families[point["hidden"], point["vocab"], point["dtype"]].append(point)
    return max(families.values(), key=len)


def curves(points: list[dict], mode: str, field: str) -> Iterator[tuple[str, list[int], list[float]]]:
    """Yields (contender, its N, the field's values), without the floor and without what was not run."""
    for name in COLOURS:
        found = [(point["rows"], by_name(point, mode).get(name, {})) for point in points]
        found = [(rows, figure[field]) for rows, figure in found if field in figure]
        if found:
            yield name, *map(list, zip(*found, strict=True))


def _plain_numbers(axis: matplotlib.axis.Axis, locator: Locator) -> None:
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def plot_by_rows(results: dict, field: str, unit: float, label: str, path: Path) -> Path:
    """Plots a panel a mode: the field over N, a line a contender."""
    points = rows_family(results)
    figure, panels = pyplot.subplots(1, len(MODES), figsize=(12, 4), sharey=True, layout="constrained")
    for mode, axes in zip(MODES, panels, strict=True):
        for name, rows, values in curves(points, mode, field):
            scaled = [value / unit for value in values]
            axes.plot(rows, scaled, marker=MARKERS[name], color=COLOURS[name], label=SHORT.get(name, name))
        axes.set(xscale="log", yscale="log", title=TITLES[mode], xlabel="N, tokens")
        axes.grid(True, alpha=0.3)
        _plain_numbers(axes.xaxis, FixedLocator([point["rows"] for point in points]))
        _plain_numbers(axes.yaxis, LogLocator(subs=(1, 2, 5)))
    panels[0].set_ylabel(label)
    first = points[0]
    figure.suptitle(f"H={first['hidden']}, V={first['vocab']}, {first['dtype']}: {results['machine']['cpu']}")
    shown = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(COLOURS))
    return _save(figure, path)


def _speed_up_bars(axes: Axes, points: list[dict]) -> None:
    height = 0.8 / len(MODES)
    for number, mode in enumerate(MODES):
        found = [by_name(point, mode) for point in points]
        ratios = [f[TRL]["median"] / f[OURS]["median"] if "median" in f.get(TRL, {}) else 0.0 for f in found]
        places = [place + (number - 1) * height for place in range(len(points))]
        bars = axes.barh(places, ratios, height, label=TITLES[mode])
        axes.bar_label(bars, [f"{ratio:.1f}×" if ratio else "not run" for ratio in ratios], padding=3, fontsize=8)


def plot_speed_up(results: dict, path: Path) -> Path:
    """Plots bars: by how much TRL is slower, at every point and in every mode."""
    points = sorted_points(results)
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.6 * len(points)), layout="constrained")
    _speed_up_bars(axes, points)
    names = [f"N={p['rows']} H={p['hidden']} V={p['vocab']} {p['dtype']}" for p in points]
    axes.set_yticks(range(len(points)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel=f"{TRL}'s time ÷ ours", title=results["machine"]["cpu"])
    axes.grid(True, axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(MODES))
    return _save(figure, path)


def _save(figure: matplotlib.figure.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def plot_all(results: dict, figures: Path) -> list[Path]:
    """Writes the three plots, beside the figures and named after them."""
    stem = figures.with_suffix("")
    return [
        plot_by_rows(results, "over_floor", 1.0, "time ÷ floor's", Path(f"{stem}_floor.png")),
        plot_by_rows(results, "extra_bytes", MIB, "extra peak memory, MiB", Path(f"{stem}_memory.png")),
        plot_speed_up(results, Path(f"{stem}_trl.png")),
    ]
