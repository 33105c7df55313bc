"""Random token trees of given lengths."""

from __future__ import annotations

import random

from trl_fast.data import Tree


def random_trees(lengths: list[tuple[int, tuple[int, ...]]], seed: int = 0, vocab_size: int = 340) -> list[Tree]:
    """A tree for each (length of the prompt, lengths of its branches), of tokens from 3 on."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocab_size) for _ in range(count)]

    return [Tree(tokens(prompt), [tokens(branch) for branch in branches]) for prompt, branches in lengths]
