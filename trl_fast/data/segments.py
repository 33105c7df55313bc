"""Describes the segments of a row of token trees: how long they are, and which one continues which."""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple, TypeAlias

# The length of a tree's first segment, then those of what continues it: a length, or a tree of its own. A prompt with
# two completions is (10, 4, 5); where the second one goes on in two ways, (10, 4, (5, 3, 2)). The row has them in this
# order. A sequence that shares nothing is a tree of one segment.
TreeLengths: TypeAlias = "tuple[int | TreeLengths, ...]"


class Segment(NamedTuple):
    """Holds the place of a segment in a row of T tokens.

    - `start`, `end`: its tokens in the row.
    - `tree_end`: where the last segment that continues it, directly or not, ends. They stand right behind it.
    - `offset`: tokens of its sequence before it, so the position of its first token.
    - `parent`: the number of the segment that it continues, None of a tree's first one.
    - `depth`: how many segments of its sequence stand before it.
    """

    start: int
    end: int
    tree_end: int
    offset: int
    parent: int | None
    depth: int

    @property
    def length(self) -> int:
        """Returns the number of its tokens."""
        return self.end - self.start

    @property
    def is_continued(self) -> bool:
        """Returns whether a segment with tokens continues it."""
        return self.tree_end > self.end


@functools.lru_cache(maxsize=64)
def segments_of(trees: tuple[TreeLengths, ...]) -> tuple[Segment, ...]:
    """Returns the segments of a row of trees in the order of the row; a parent comes before what continues it."""
    found: list[Segment] = []
    # Trees that wait, the next one last: each with the number of its parent.
    waiting: list[tuple[TreeLengths | int, int | None]] = [(tree, None) for tree in reversed(trees)]
    start = 0
    while waiting:
        tree, parent = waiting.pop()
        length, *children = (tree,) if isinstance(tree, int) else tree
        assert isinstance(length, int), "a tree begins with the length of its first segment"
        offset, depth = (0, 0) if parent is None else _after(found[parent])
        end = start + length
        waiting += [(child, len(found)) for child in reversed(children)]
        found.append(Segment(start, end, end + sum(map(num_tokens, children)), offset, parent, depth))
        start = end
    return tuple(found)


def _after(parent: Segment) -> tuple[int, int]:
    """Returns offset and depth of what continues a segment."""
    return parent.offset + parent.length, parent.depth + 1


def num_tokens(tree: TreeLengths | int) -> int:
    """Returns the tokens that a tree has in a row."""
    return tree if isinstance(tree, int) else sum(map(num_tokens, tree))


def sequences_of(trees: tuple[TreeLengths, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the sequences of a row of trees, in order: the numbers of each one's segments, first to last.

    A sequence ends with each segment that nothing continues, be it empty or not.
    """
    segments = segments_of(trees)
    continued = {segment.parent for segment in segments}
    paths: list[tuple[int, ...]] = []
    found = []
    for number, segment in enumerate(segments):
        paths.append((*(paths[segment.parent] if segment.parent is not None else ()), number))
        if number not in continued:
            found.append(paths[number])
    return tuple(found)


def sequence_lengths(trees: tuple[TreeLengths, ...]) -> tuple[int, ...]:
    """Returns the tokens of each sequence of a row of trees, in order."""
    segments = segments_of(trees)
    return tuple(segments[path[-1]].offset + segments[path[-1]].length for path in sequences_of(trees))


def sequence_counts(trees: tuple[TreeLengths, ...]) -> tuple[int, ...]:
    """Returns how many sequences go through each segment of a row of trees, in the order of the row."""
    counts = Counter(number for path in sequences_of(trees) for number in path)
    return tuple(counts[number] for number in range(len(segments_of(trees))))
