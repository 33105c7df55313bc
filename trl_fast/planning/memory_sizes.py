"""Reads sizes of memory from people, and writes them for people."""

from __future__ import annotations

import re

GIB = 1 << 30
_UNITS = {"": GIB, "MIB": 1 << 20, "GIB": GIB, "TIB": 1 << 40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def gib(size: float) -> str:
    """Writes bytes as GiB, without the unit."""
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def parse_memory(text: str) -> int:
    """Reads the bytes of a size such as 80GiB, 24 GB or 80 (GiB).

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match.group(2).upper())
    size = 0 if match is None or unit is None else int(float(match.group(1)) * unit)
    if size < 1:
        raise ValueError(f"gpu_memory={text!r}: expected a size above zero such as 80GiB, 24GB or 80 (GiB)")
    return size
