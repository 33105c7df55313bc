"""Cuts the attention of a row of token trees into parts, each of which is one call of a common attention kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trl_fast.data.segments import Segment, TreeLengths, segments_of

from .row_attention import RowMask


class Part(NamedTuple):
    """Holds queries that attend to keys of a row.

    - `queries`: their tokens in the row.
    - `keys`: tokens in the row, range after range, in the order of their sequence.
    - `causal`: the last query attends to all keys, each query before it to one key less at the end; else every query
      attends to all keys.
    - `window`: of a causal part: the last keys that a query attends to; None: all.
    - `backwards`: queries and keys are taken from the last to the first. Causal then means that a query attends to
      what stands behind it in the row.
    """

    queries: slice
    keys: tuple[slice, ...]
    causal: bool
    window: int | None = None
    backwards: bool = False

    @property
    def num_queries(self) -> int:
        """Returns the number of its queries."""
        return length(self.queries)

    @property
    def num_keys(self) -> int:
        """Returns the number of its keys."""
        return sum(map(length, self.keys))

    @property
    def is_triangle(self) -> bool:
        """Returns whether its queries attend to as many keys, causally: the first to one, the last to all."""
        return self.causal and self.window is None and self.num_queries == self.num_keys


def length(tokens: slice) -> int:
    """Returns the number of tokens of a range."""
    return tokens.stop - tokens.start


@functools.lru_cache(maxsize=64)
def attention_parts(mask: RowMask) -> tuple[tuple[Part, ...], ...]:
    """Returns the parts of a row's attention in groups; in a group no token is a query twice.

    The first group covers the row: every segment attends to itself causally. One group is that of the runs. Each other
    group is a depth of the trees: all that continues a segment attends to the whole of it. What continues a segment
    stands right behind it, so it is one block of queries, whatever the number of branches.

    In a tree with a sequence that is longer than the window each segment is one part, whose keys are also the end of
    what the segment continues.
    """
    segments, window = segments_of(mask.trees), mask.window
    slides = _slides(segments, window)
    own = [
        _windowed(segments, number, window) if slides[number] else Part(_own(s), (_own(s),), True)
        for number, s in enumerate(segments)
        if s.length
    ]
    across: dict[int, list[Part]] = {}
    for s, windowed in zip(segments, slides, strict=True):
        if s.length and s.is_continued and not windowed:
            across.setdefault(s.depth, []).append(Part(slice(s.end, s.tree_end), (_own(s),), False))
    return (tuple(own), *_parts_of_runs(mask), *(tuple(across[depth]) for depth in sorted(across)))


def _parts_of_runs(mask: RowMask) -> Iterator[tuple[Part, ...]]:
    """Yields the groups of what tokens of a run attend to beside their sequence up to themselves.

    A token attends to the tokens of its run behind itself: read backwards, all but the last one attend causally to all
    but the first one. Whole runs: what the window hides of a run is a causal triangle too.
    """
    behind = [
        Part(slice(start, end - 1), (slice(start + 1, end),), True, backwards=True)
        for start, end in mask.runs
        if end - start > 1
    ]
    before = [
        Part(slice(start + mask.window, end), (slice(start, end - mask.window),), True)
        for start, end in mask.runs
        if mask.whole_runs and mask.window is not None and end - start > mask.window
    ]
    yield from (tuple(group) for group in (behind, before) if group)


def _own(segment: Segment) -> slice:
    return slice(segment.start, segment.end)


def longest_sequence(trees: tuple[TreeLengths, ...]) -> int:
    """Returns the tokens of the longest sequence of a row of trees."""
    return max((s.offset + s.length for s in segments_of(trees)), default=0)


@functools.lru_cache(maxsize=64)
def run_across_segments(mask: RowMask) -> tuple[int, int] | None:
    """Returns the first run that does not lie within a segment behind the run before it; None: all do."""
    waiting = list(reversed(mask.runs))
    for s in segments_of(mask.trees):
        start = s.start
        while waiting and start <= waiting[-1][0] < waiting[-1][1] <= s.end:
            start = waiting.pop()[1]
    return waiting[-1] if waiting else None


def _slides(segments: Sequence[Segment], window: int | None) -> list[bool]:
    """Returns of each segment whether a sequence of its tree is longer than the window."""
    if window is None:
        return [False] * len(segments)
    longest: list[int] = []  # of each tree
    trees = []
    for s in segments:
        if s.parent is None:
            longest.append(0)
        trees.append(len(longest) - 1)
        longest[-1] = max(longest[-1], s.offset + s.length)
    return [longest[tree] > window for tree in trees]


def _windowed(segments: Sequence[Segment], number: int, window: int | None) -> Part:
    """Returns the part of a segment: its queries, the last window - 1 tokens before it and its own as keys."""
    assert window is not None
    own = _own(segments[number])
    missing, ranges, parent = window - 1, [own], segments[number].parent
    while missing > 0 and parent is not None:
        before = segments[parent]
        start = max(before.start, before.end - missing)
        missing -= before.end - start
        if before.end == ranges[-1].start:
            ranges[-1] = slice(start, ranges[-1].stop)
        elif before.length:
            ranges.append(slice(start, before.end))
        parent = before.parent
    part = Part(own, tuple(reversed(ranges)), True, window)
    return part if part.num_keys > window else part._replace(window=None)


def blocks_of(part: Part, size: int) -> Iterator[Part]:
    """Yields a part that needs a mask in blocks of `size` queries, each with the keys that its queries attend to.

    Queries that attend to all of their segment before them, and to nothing else, are one block.
    """
    if part.is_triangle or not part.causal:
        yield part
        return
    before, window = part.num_keys - part.num_queries, part.window or part.num_keys
    first = size if before else window
    for start, end in itertools.pairwise([0, *range(first, part.num_queries, size), part.num_queries]):
        first_key = max(0, before + start - window + 1)
        keys = tuple(_cut(part.keys, first_key, before + end))
        queries = slice(part.queries.start + start, part.queries.start + end)
        yield Part(queries, keys, True, window if before + end - first_key > window else None)


def _cut(ranges: Sequence[slice], start: int, end: int) -> Iterator[slice]:
    """Yields what ranges have from their `start`-th to before their `end`-th token."""
    for one in ranges:
        size = length(one)
        if max(start, 0) < min(end, size):
            yield slice(one.start + max(start, 0), one.start + min(end, size))
        start, end = start - size, end - size
