"""Ranges cut into consecutive slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def group_spans(sizes: Sequence[int], step: int) -> Iterator[slice]:
    """Consecutive slices of whole groups that cover range(sum(sizes)): at most `step` rows, or a single group."""
    start = end = 0
    for size in sizes:
        if end > start and end + size - start > step:
            yield slice(start, end)
            start = end
        end += size
    if end > start:
        yield slice(start, end)


def even_step(total: int, limit: int) -> int:
    """The step of at most `limit` that covers `total` in equal parts: a small last one would be a slow product."""
    parts = max(1, -(-total // limit))
    return -(-total // parts)


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
