"""Cuts the attention of a row of token trees into parts, each of which is one call of a common attention kernel."""

from __future__ import annotations

import functools
from typing import NamedTuple

from trl_fast.data.segments import TreeLengths, segments_of


class Part(NamedTuple):
    """Holds queries that attend to keys of a row: to all of them, or causally to their own."""

    queries: slice
    keys: slice
    causal: bool


@functools.lru_cache(maxsize=64)
def attention_parts(trees: tuple[TreeLengths, ...]) -> tuple[tuple[Part, ...], ...]:
    """Returns the parts of a row's attention in groups; in a group no token is a query twice.

    The first group covers the row: every segment attends to itself causally. Each other group is a depth of the trees:
    all that continues a segment attends to the whole of it. What continues a segment stands right behind it, so it is
    one block of queries, whatever the number of branches.
    """
    segments = segments_of(trees)
    own = [Part(slice(s.start, s.end), slice(s.start, s.end), True) for s in segments if s.length]
    across: dict[int, list[Part]] = {}
    for s in segments:
        if s.length and s.is_continued:
            part = Part(slice(s.end, s.tree_end), slice(s.start, s.end), False)
            across.setdefault(s.depth, []).append(part)
    return (tuple(own), *(tuple(across[depth]) for depth in sorted(across)))
