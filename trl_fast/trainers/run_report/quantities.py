"""Writes numbers, sizes and times for people."""

from __future__ import annotations

GIB = 1 << 30
_MIB = 1 << 20


def count_text(count: float) -> str:
    """Writes a number in at most four digits: 950, 12.3k, 134.5M, 8.03B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if count >= size:
            scaled = count / (1e3 if unit == "k" else size)
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{count:,.0f}"


def size_text(size: float) -> str:
    """Writes bytes as GiB, small ones as MiB or KiB."""
    if size >= 100 * GIB:
        return f"{size / GIB:.0f} GiB"
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / _MIB:.0f} MiB" if size >= _MIB else f"{size / 1024:.0f} KiB"


def time_text(seconds: float) -> str:
    """Writes a time in its two largest units: 4.2 s, 3 min 12 s, 2 h 5 min; a short one in ms."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def share_text(part: float, whole: float) -> str:
    """Writes a share in percent; one that is neither none nor all never looks so."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.2g}%" if percent < 1 else f"{percent:.0f}%" if percent < 99.5 or percent == 100 else ">99%"
