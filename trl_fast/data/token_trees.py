"""Holds token trees, and finds what the token sequences of a batch share.

A row without padding holds a shared beginning once. What is shared is told by neighbours: how many of its first tokens
a sequence has in common with the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trl_fast.settings.choices import TRUNCATION_MODES

from .images.inputs import ImageInput
from .segments import TreeLengths

# Levels of a tree. Python compares, copies and prints nested tuples to a depth of less than 1000.
_DEEPEST = 512


@dataclass(frozen=True)
class Tree:
    """Holds one example: a prompt and its completions.

    `prompt_ids` are the token ids of the prompt (it may be empty); `branches` are the token ids of each completion,
    in the order in which a loss counts them (chosen, then rejected, for a preference pair). Completions that begin
    alike may be a tree of their own: its `prompt_ids` belong to each of them, and are scored in each of them.
    `images` are those that image tokens of `prompt_ids` stand for, in order; a completion with images is a tree of its
    own.
    """

    prompt_ids: list[int]
    branches: Sequence[list[int] | Tree]
    images: tuple[ImageInput, ...] = ()


class TokenSequence(NamedTuple):
    """Holds a prompt and one of its completions.

    - `ids`: the token ids of both.
    - `start`: where the completion begins.
    - `shared`: how many of the first tokens are also those of the sequence before it, as far as that is known.
    - `images`: those that its image tokens stand for, in order.
    """

    ids: list[int]
    start: int
    shared: int = 0
    images: tuple[ImageInput, ...] = ()


def tree_sequences(tree: Tree) -> list[TokenSequence]:
    """Returns the sequences of a tree, in order: its prompt with each of its completions."""
    found: list[TokenSequence] = []
    _add_sequences(tree, TokenSequence([], len(tree.prompt_ids)), found)
    return found


def _add_sequences(tree: Tree, before: TokenSequence, found: list[TokenSequence]) -> None:
    """Adds the sequences of a tree that continues `before`; the first one shares what that does with the last one."""
    prompt = before._replace(ids=before.ids + tree.prompt_ids, images=before.images + tree.images)
    for branch in tree.branches:
        if isinstance(branch, Tree):
            _add_sequences(branch, prompt, found)
        else:
            found.append(prompt._replace(ids=prompt.ids + branch))
        prompt = prompt._replace(shared=len(prompt.ids))


def truncate_sequences(
    sequences: list[TokenSequence], max_length: int | None, mode: str = "keep_start"
) -> list[TokenSequence]:
    """Cuts sequences to `max_length` tokens: their first ones with `keep_start`, their last ones with `keep_end`.

    Sequences whose beginnings are cut differently share nothing any more. `None` cuts nothing.

    Raises ValueError for an unknown mode and for a `max_length` below 1.
    """
    if mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode={mode!r} is unknown; expected one of {', '.join(TRUNCATION_MODES)}.")
    if max_length is None:
        return sequences
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no token; expected a positive number or None.")
    if mode == "keep_start":
        return [
            TokenSequence(ids[:max_length], min(start, max_length), min(shared, max_length), images)
            for ids, start, shared, images in sequences
        ]
    found, excess_before = [], 0
    for ids, start, shared, images in sequences:
        excess = max(len(ids) - max_length, 0)
        shared = max(shared - excess, 0) if excess == excess_before else 0
        found.append(TokenSequence(ids[excess:], max(start - excess, 0), shared, images))
        excess_before = excess
    return found


def neighbours_share(sequences: Sequence[Sequence[int] | np.ndarray]) -> list[int]:
    """Counts the first tokens that each of S sequences has in common with the one before it; 0 for the first.

    It takes time in proportion to the tokens.
    """
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    found = [0] * min(len(arrays), 1)
    for one, other in zip(arrays[:-1], arrays[1:], strict=True):
        shorter = min(len(one), len(other))
        differ = np.flatnonzero(one[:shorter] != other[:shorter])
        found.append(int(differ[0]) if len(differ) else shorter)
    return found


def shared_prefixes(lengths: Sequence[int], shared: Sequence[int], shortest: int) -> tuple[TreeLengths, ...]:
    """Returns the prefix trees of S sequences: `segments.sequences_of` them are the sequences in the same order.

    Neighbours that begin with the same tokens have one segment of them. Beginnings that other sequences continue
    differently further on nest.

    Args:
        lengths: (S,), the tokens of each sequence.
        shared: (S,), how many of its first tokens a sequence has in common with the one before it; that of the first
            is not read.
        shortest: no segment that several sequences share has fewer tokens, and at least one; such tokens stand in each
            of the sequences. It is more where trees would have over 512 levels, such as those of a conversation of
            a thousand turns.
    """
    shortest = max(shortest, 1)
    if len(lengths) > _DEEPEST:
        # A level has a sequence less than the one above it, and as many tokens as a shared segment at least.
        shortest = max(shortest, max(shared[1:]) // _DEEPEST + 1)
    return _trees_of(0, len(lengths), 0, lengths, shared, shortest)


def _trees_of(
    first: int, last: int, offset: int, lengths: Sequence[int], shared: Sequence[int], shortest: int
) -> tuple[TreeLengths, ...]:
    """Returns the trees of sequences first … last − 1 without their first `offset` tokens, which all of them share."""
    found: list[TreeLengths] = []
    begin = first
    for end in range(first + 1, last + 1):
        if end < last and shared[end] - offset >= shortest:
            continue
        if end - begin == 1:
            found.append((lengths[begin] - offset,))
        else:
            common = min(shared[begin + 1 : end])
            children = _trees_of(begin, end, common, lengths, shared, shortest)
            found.append((common - offset, *(child if len(child) > 1 else child[0] for child in children)))
        begin = end
    return tuple(found)
