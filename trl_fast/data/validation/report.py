"""Reports the result of a validation as tables, a picture, JSON and a verdict."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from .findings import SEVERITIES, Finding
from .preference_record import SIDES
from .split_checks import LENGTH_COLUMNS, SplitTable

FAIL_ON = ("error", "warning", "never")
PERCENTILES = (50, 95, 100)
SHOWN_SCRIPTS = 3
# Longer responses than this percentile are left out of the picture, which they would squeeze.
PLOTTED_PERCENTILE = 99
BINS = 40
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class ValidationReport:
    """Holds the findings, worst first, and the measures of each split."""

    findings: list[Finding]
    tables: list[SplitTable]
    settings: dict[str, Any] = field(default_factory=dict)

    def failed(self, fail_on: str = "error") -> bool:
        """Says whether there is a finding at least as bad as `fail_on`: "error", "warning" or "never".

        Raises ValueError for any other value.
        """
        if fail_on not in FAIL_ON:
            raise ValueError(f"fail_on={fail_on!r}; expected one of {', '.join(FAIL_ON)}.")
        if fail_on == "never":
            return False
        return any(SEVERITIES.index(finding.severity) >= SEVERITIES.index(fail_on) for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """Counts the findings by severity, worst first."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in reversed(SEVERITIES)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the report in JSON's types."""
        return {
            "settings": self.settings,
            "counts": self.counts(),
            "splits": {table.name: split_facts(table) for table in self.tables},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def save_json(self, path: str | Path) -> None:
        """Writes the report to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def splits_table(self) -> Table:
        """Returns the splits, their sizes, lengths and scripts, for rich to print."""
        title = f"Splits (lengths in {self.tables[0].unit}: median / 95% / largest)"
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in ("split", "rows", "format", *LENGTH_COLUMNS, "scripts"):
            table.add_column(name, justify="right" if name == "rows" else "left")
        for split in self.tables:
            lengths = [" / ".join(f"{value:,}" for value in _percentiles(split, column)) for column in LENGTH_COLUMNS]
            cells = [split.name, f"{split.total:,}", _format_name(split), *lengths, _scripts_line(split)]
            table.add_row(*map(Text, cells))
        return table

    def images_table(self) -> Table | None:
        """Returns how many images the splits have, their sizes and modes, for rich to print; None without images."""
        if not any(split.images.rows for split in self.tables):
            return None
        title = "Images (pixels: smallest / median / largest)"
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in ("split", "rows with images", "images", "width", "height", "modes"):
            table.add_column(name, justify="right" if name in ("rows with images", "images") else "left")
        for split in self.tables:
            facts = split.images.facts()
            sizes = [" / ".join(f"{value:,}" for value in facts[name]) for name in ("width", "height")]
            modes = ", ".join(f"{mode} {count:,}" for mode, count in facts["modes"].items())
            cells = [split.name, f"{facts['rows']:,}", f"{facts['images']:,}", *sizes, modes]
            table.add_row(*map(Text, cells))
        return table

    def findings_table(self) -> Table:
        """Returns the findings, worst first, for rich to print."""
        table = Table(title="Findings", title_justify="left", header_style="bold", show_lines=True)
        for name in ("severity", "finding, remedy", "split", "rows", "share", "first row"):
            table.add_column(name, justify="right" if name in ("rows", "share") else "left")
        for finding in self.findings:
            rows = finding.row_numbers
            example = Text(f"{rows[0]}" if rows else "")
            title = Text(finding.kind.title)
            if finding.detail:
                title.append(f"\n{finding.detail}", style="dim")
            title.append(f"\n{finding.kind.remedy}")
            table.add_row(
                Text(finding.severity, style=STYLES[finding.severity]),
                title,
                Text(finding.split),
                f"{len(rows):,}",
                "<0.1%" if 0 < finding.share < 0.001 else f"{finding.share:.1%}",
                example,
            )
        return table

    def save_plot(self, path: str | Path) -> None:
        """Plots the response lengths, and for pairs of chosen minus rejected, one row of plots a split."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.2 * len(self.tables)), layout="constrained")
        axes = figure.subplots(len(self.tables), 2, squeeze=False)
        for (left, right), table in zip(axes, self.tables, strict=True):
            _plot_lengths(left, table)
            _plot_differences(right, table)
        figure.savefig(path, dpi=120)


def split_facts(table: SplitTable) -> dict[str, Any]:
    """Returns size, format, lengths and scripts of a split, in JSON's types.

    `scripts` has, by column, the share of rows whose letters are mostly of that script ("none" where there are hardly
    any letters). It tells scripts, not languages.
    """
    scripts = {
        column: {script: count / found.total() for script, count in found.most_common()}
        for column, found in table.scripts.items()
    }
    lengths = {}
    for column in LENGTH_COLUMNS:
        values = table.known_lengths(column)
        if len(values):
            percentiles = dict(zip(map(str, PERCENTILES), _percentiles(table, column), strict=True))
            lengths[column] = {"mean": float(values.mean()), "percentiles": percentiles}
    return {
        "rows": table.total,
        "readable_rows": len(table.rows),
        "format": _format_name(table),
        "length_unit": table.unit,
        "lengths": lengths,
        "scripts": scripts,
        "images": table.images.facts(),
    }


def _format_name(table: SplitTable) -> str:
    kind = "pairs" if table.paired else "labelled"
    return f"{kind}, {'messages' if table.conversational else 'text'}{', no prompt' if table.implicit_prompt else ''}"


def _percentiles(table: SplitTable, column: str) -> list[int]:
    values = table.known_lengths(column)
    return [int(value) for value in np.percentile(values, PERCENTILES)] if len(values) else []


def _scripts_line(table: SplitTable) -> str:
    found = sum(table.scripts.values(), Counter())
    return ", ".join(f"{script} {count / found.total():.0%}" for script, count in found.most_common(SHOWN_SCRIPTS))


def _plot_lengths(axes: Any, table: SplitTable) -> None:
    names = SIDES if table.paired else ("desirable", "undesirable")
    lengths = {name: table.known_lengths(column) for name, column in zip(names, SIDES, strict=True)}
    everything = np.concatenate(list(lengths.values()))
    axes.set(title=f"{table.name}: response lengths", xlabel=table.unit, ylabel="rows")
    if not len(everything):
        return
    bins = _whole_bins(0, np.percentile(everything, PLOTTED_PERCENTILE))
    for (name, values), color in zip(lengths.items(), ("tab:blue", "tab:orange"), strict=True):
        if len(values):
            label = f"{name}, median {np.median(values):,.0f}"
            axes.hist(values, bins, histtype="stepfilled", alpha=0.45, color=color, label=label)
    axes.legend(title=_left_out(everything, bins))


def _plot_differences(axes: Any, table: SplitTable) -> None:
    chosen, rejected = (table.lengths(column) for column in SIDES)
    both = (chosen >= 0) & (rejected >= 0)
    if not both.any():
        axes.set_axis_off()
        return
    difference = (chosen - rejected)[both]
    edge = np.percentile(np.abs(difference), PLOTTED_PERCENTILE)
    bins = _whole_bins(-edge, edge)
    axes.hist(difference, bins, color="tab:gray", alpha=0.6)
    axes.axvline(0, color="black", linewidth=1)
    label = f"median {np.median(difference):+,.0f}"
    axes.axvline(np.median(difference), color="tab:red", linestyle="--", label=label)
    axes.set(title=f"{table.name}: chosen − rejected", xlabel=table.unit, ylabel="rows")
    axes.legend(title=_left_out(difference, bins))


def _whole_bins(low: float, high: float) -> np.ndarray:
    """Returns edges of about BINS bins or fewer, of equally many whole numbers each, that hold `low` to `high`."""
    low, high = math.floor(low), math.ceil(high)
    width = math.ceil((high - low + 1) / BINS)
    return np.arange(low - 0.5, high + width, width)


def _left_out(values: np.ndarray, bins: np.ndarray) -> str | None:
    count = np.count_nonzero((values < bins[0]) | (values > bins[-1]))
    return f"{count:,} beyond the edge" if count else None
