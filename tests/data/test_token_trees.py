"""Token trees: their sequences, what is cut of them, and the prefix trees of sequences that begin alike."""

import random
from itertools import pairwise

import pytest

from trl_fast.data import Tree
from trl_fast.data.segments import num_tokens, segments_of, sequence_lengths, sequences_of
from trl_fast.data.token_trees import (
    TokenSequence,
    neighbours_share,
    shared_prefixes,
    tree_sequences,
    truncate_sequences,
)


def test_sequences_of_a_tree_that_nests():
    tree = Tree([1, 2], [[3], Tree([4, 5], [[6], [], Tree([], [[7], [8]])]), []])
    assert tree_sequences(tree) == [
        TokenSequence([1, 2, 3], 2, 0),
        TokenSequence([1, 2, 4, 5, 6], 2, 2),
        TokenSequence([1, 2, 4, 5], 2, 4),
        TokenSequence([1, 2, 4, 5, 7], 2, 4),
        TokenSequence([1, 2, 4, 5, 8], 2, 4),
        TokenSequence([1, 2], 2, 2),
    ]
    assert tree_sequences(Tree([1], [])) == []


def test_what_is_cut_is_shared_as_far_as_it_is_cut_alike():
    def cut(tree, *how):
        return [tuple(sequence[:3]) for sequence in truncate_sequences(tree_sequences(tree), *how)]

    tree = Tree([1, 2, 3, 4], [[5, 6], [7, 8]])
    assert truncate_sequences(tree_sequences(tree), None) == tree_sequences(tree)
    assert cut(tree, 5) == [([1, 2, 3, 4, 5], 4, 0), ([1, 2, 3, 4, 7], 4, 4)]
    assert cut(tree, 3) == [([1, 2, 3], 3, 0), ([1, 2, 3], 3, 3)]
    assert cut(tree, 4, "keep_end") == [([3, 4, 5, 6], 2, 0), ([3, 4, 7, 8], 2, 2)]
    assert cut(tree, 1, "keep_end") == [([6], 0, 0), ([8], 0, 0)]
    uneven = Tree([1, 2, 3, 4], [[5], [6, 7, 8, 9], [1, 1, 1, 1]])
    assert cut(uneven, 3, "keep_end") == [([3, 4, 5], 2, 0), ([7, 8, 9], 0, 0), ([1, 1, 1], 0, 0)]
    with pytest.raises(ValueError, match="max_length=0 leaves no token"):
        cut(tree, 0)


def random_sequences(rng, count):
    """Sequences of few different tokens, many of which begin like another one, are its beginning, or are empty."""
    found = [[]]
    for _ in range(count):
        known = rng.choice(found)
        found.append(known[: rng.randrange(len(known) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(9))])
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("ordered", [False, True])
def test_prefix_trees_are_the_sequences_with_each_shared_beginning_once(ordered):
    rng = random.Random(3)
    for _ in range(150):
        sequences = random_sequences(rng, rng.randrange(12))
        sequences = sorted(sequences) if ordered else sequences
        shortest, shared = rng.choice((0, 1, 4)), neighbours_share(sequences)
        assert all(
            one[:count] == other[:count] for (one, other), count in zip(pairwise(sequences), shared[1:], strict=True)
        )
        trees = shared_prefixes([*map(len, sequences)], shared, shortest)
        assert sequence_lengths(trees) == tuple(map(len, sequences))
        row = {}
        for ids, path in zip(sequences, sequences_of(trees), strict=True):
            for segment in (segments_of(trees)[number] for number in path):
                part = ids[segment.offset : segment.offset + segment.length]
                assert row.setdefault(segment, part) == part
        continued = {segment.parent for segment in segments_of(trees)} - {None}
        assert all(segments_of(trees)[number].length >= max(shortest, 1) for number in continued)
        if ordered and shortest < 2:
            beginnings = {tuple(ids[:length]) for ids in sequences for length in range(1, len(ids) + 1)}
            assert sum(map(num_tokens, trees)) == len(beginnings)


def test_a_conversation_whose_earlier_turns_lose_their_thoughts():
    # Three turns of 50 tokens, the thought and the answer; 20 of which stay, with 5 of the next question, later on.
    turns = [[0] * 30 + [1] * 50, [0] * 30 + [2] * 25 + [3] * 50, [0] * 30 + [2] * 25 + [4] * 25 + [5] * 50]
    trees = shared_prefixes([80, 105, 130], neighbours_share(turns), 16)
    assert trees == ((30, 50, (25, 50, 75)),)
    assert num_tokens(trees[0]) == 230
    # Fewer than the shortest segment are not shared on.
    assert shared_prefixes([80, 105, 130], neighbours_share(turns), 26) == ((30, 50, 75, 100),)


def test_many_levels():
    """400 turns, each of which goes on from the context of the one before it."""
    turns = [[*range(20 * turn), 10**6 + turn] for turn in range(1, 401)]
    trees = shared_prefixes([*map(len, turns)], neighbours_share(turns), 16)
    assert num_tokens(trees[0]) == 20 * 399 + 400 + 20


def test_a_conversation_of_a_thousand_turns_has_bounded_levels():
    """Where Python's recursion ends. Its turns are 40 tokens longer each, of which the last 20 are dropped."""
    lengths, shared = [40 * turn + 40 for turn in range(1000)], [max(40 * turn - 20, 0) for turn in range(1000)]
    trees = shared_prefixes(lengths, shared, 16)
    assert list(sequence_lengths(trees)) == lengths
    assert max(segment.depth for segment in segments_of(trees)) <= 512
    assert hash(trees) == hash(shared_prefixes(lengths, shared, 16)) and sum(map(num_tokens, trees)) < 4 * lengths[-1]
