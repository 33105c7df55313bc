"""How far log-probs move with their neighbours: measured on the right tokens."""

from __future__ import annotations

import pytest
import torch

from benchmarks.neighbours import OTHERS, logprobs_of, measure, random_llama, trees_beside

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_a_sequence_moves_by_rounding_only(layout):
    rows = measure(layout, "float32", sequences=1, tokens=20, **TINY)
    assert [row["others"] for row in rows] == list(OTHERS)
    assert all(row["median"] <= row["largest"] < 1e-5 and 0 < row["rounding"] < 1e-5 for row in rows)


def test_the_sequence_stands_among_as_many_others():
    prompt, completion = [5, 6, 7], [8, 9, 10, 11]
    trees = trees_beside(prompt, completion, 7, 300, seed=0)
    assert sum(len(tree.branches) for tree in trees) == 8
    assert [len(tree.branches) for tree in trees] == [1, 1, 4, 1, 1]
    assert trees[2].prompt_ids == prompt and trees[2].branches[0] is completion
    model = random_llama("padded", torch.float32, **TINY)
    changed = [*completion[:-1], completion[-1] + 1]
    own, other = (
        logprobs_of(model, "padded", trees_beside(prompt, ids, 7, 300, 0), ids) for ids in (completion, changed)
    )
    assert torch.allclose(own[:-1], other[:-1], atol=1e-5) and abs(own[-1] - other[-1]) > 1e-3
