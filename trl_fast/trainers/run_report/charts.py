"""Lays out line charts of logged metrics: pure arithmetic, which a template draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The drawing's units, and the margins for the axes' numbers.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 58, 12, 10, 24
# Points that a line keeps; more than a screen has columns.
_MOST_POINTS = 800
# Figures of the training as a whole, and what says nothing of learning.
_NOT_CURVES = ("train_", "epoch", "step", "total_flos", "_runtime", "_per_second", "_tokens", "tokens_seen")
_EVALUATION = "eval_"


@dataclass(frozen=True)
class Tick:
    """Holds a place on an axis, in the drawing's units, and its number as text."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """Holds a curve: its name, the points "x,y x,y ..." in the drawing's units, and its last value."""

    name: str
    points: str
    last: str
    is_evaluation: bool


@dataclass(frozen=True)
class Chart:
    """Holds a chart of one metric: in training, in evaluation or both."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


def make_charts(history: Sequence[Mapping[str, float]], first: Sequence[str]) -> list[Chart]:
    """Makes a chart of each metric that was logged at two steps or more.

    Args:
        history: the logs, each with its "step".
        first: names of the metrics whose charts come first.
    """
    series = _series(history)
    titles = dict.fromkeys([*first, *series])
    groups = {title: [name for name in (title, _EVALUATION + title) if name in series] for title in titles}
    shown = {name for names in groups.values() for name in names if name.startswith(_EVALUATION)}
    return [
        _chart(title, {name: series[name] for name in names})
        for title, names in groups.items()
        if names and title not in shown
    ]


def _series(history: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for log in history:
        for name, value in log.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if is_number and not name.startswith(_NOT_CURVES) and not name.endswith(_NOT_CURVES):
                series.setdefault(name, []).append((log.get("step", 0), float(value)))
    return {name: points for name, points in series.items() if len({step for step, _ in points}) > 1}


def _chart(title: str, series: Mapping[str, list[tuple[float, float]]]) -> Chart:
    points = [point for line in series.values() for point in line]
    steps, values = [step for step, _ in points], [value for _, value in points]
    across, up = ticks(min(steps), max(steps)), ticks(min(values), max(values))
    low, high = min(up[0], *values), max(up[-1], *values)
    first, last = min(steps), max(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return round(x, 1), round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for name, line in series.items():
        stride = -(-len(line) // _MOST_POINTS)
        kept = [*line[:-1:stride], line[-1]]
        text = " ".join(f"{x},{y}" for x, y in (place(*point) for point in kept))
        lines.append(Line(name, text, f"{line[-1][1]:.4g}", name.startswith(_EVALUATION)))
    inside = [step for step in across if first <= step <= last]
    return Chart(
        title,
        tuple(lines),
        tuple(Tick(place(step, low)[0], f"{step:g}") for step in inside),
        tuple(Tick(place(first, value)[1], f"{value:.4g}") for value in up),
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Returns round numbers, about `count`, from at or below `low` to at or above `high`."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        spread = abs(low) / 2 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * (1 - 1e-9))
    start = math.floor(low / step + 1e-9)
    digits = 12 - math.floor(math.log10(step))
    return [round(index * step, digits) for index in range(start, math.ceil(high / step - 1e-9) + 1)]
