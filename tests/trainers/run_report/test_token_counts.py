"""Counted tokens: of the sequences, of what is computed, and of padded rows."""

import pytest

from trl_fast.data.packing import LAYOUTS, pack_trees
from trl_fast.data.token_trees import Tree
from trl_fast.trainers.run_report.token_counts import count_tokens

PROMPT = [*range(3, 23)]
# Sequences of 24, 27, 25 and 21 tokens: padded, 4 rows of 27; with a prompt once, 2 prompts of 20 and 17 tokens.
TREES = [Tree(PROMPT, [[5] * 4, [6] * 7]), Tree(PROMPT, [[5] * 5, [6]])]


@pytest.mark.parametrize(("layout", "computed"), [("shared_prefix", 57), ("packed", 97), ("padded", 108)])
def test_layouts(layout, computed):
    counts = count_tokens([pack_trees(TREES, layout, 2)])
    assert (counts.seen, counts.computed, counts.padded) == (97, computed, 108)
    assert counts.saved == pytest.approx(1 - computed / 108)


def test_each_micro_batch_is_padded_for_itself():
    counts = count_tokens(pack_trees([tree], "packed", 2) for tree in TREES)
    assert counts.padded == 2 * 27 + 2 * 25


def test_nothing_counted_saves_nothing():
    assert count_tokens([]).saved is None
    assert len(LAYOUTS) == 3
