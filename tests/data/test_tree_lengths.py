"""Trees of prepared rows are measured as they are batched: cut, with a shared prompt once, or packed."""

import numpy as np
import pytest
from datasets import Dataset

from support.preferences import random_pairs
from trl_fast.data import LabelledCollator, PreferenceCollator, RewardCollator
from trl_fast.data.assistant_turns import joined_rows
from trl_fast.data.balanced_batches import tree_sizes
from trl_fast.data.tree_lengths import measured_trees
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("name", ["shared_prefix", "packed"])
def test_tokens_are_those_of_the_batch(name, max_length, monkeypatch):
    monkeypatch.setattr("trl_fast.data.packing.MIN_SHARED_TOKENS", 0)
    rows = [row for row in random_pairs(1010, seed=3) if len(row["prompt_ids"]) < (max_length or 100)]
    # Rows whose numbers are not those of the table that they lie in.
    dataset = Dataset.from_list(rows).select(range(len(rows) - 1, -1, -1))
    sizes = measured_trees(dataset, COLUMNS, max_length, shares_prompts=BATCH_LAYOUTS[name].shares_prompts)
    assert len(sizes.tokens) == len(rows)
    collate = PreferenceCollator(0, max_length=max_length, layout=name)
    for tokens, row in list(zip(sizes.tokens, dataset, strict=True))[:40]:
        assert tokens == collate([row]).token_batch().input_ids.numel()


def test_a_reward_models_pair_shares_what_it_begins_with(monkeypatch):
    monkeypatch.setattr("trl_fast.data.packing.MIN_SHARED_TOKENS", 0)
    rows = [
        {"chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9]},
        {"chosen_ids": [5], "rejected_ids": [5, 6]},
        {"chosen_ids": [1, 2], "rejected_ids": [3]},
    ]
    dataset = Dataset.from_list(rows)
    shared = measured_trees(dataset, ("chosen_ids", "rejected_ids"), None, shares_prompts=True)
    assert shared.tokens.tolist() == [5, 2, 3]
    collate = RewardCollator(0, "shared_prefix")
    assert shared.tokens.tolist() == [collate([row]).token_batch().input_ids.numel() for row in rows]
    expected = tree_sizes(np.array([2, 1, 0]), np.array([[2, 1], [0, 1], [2, 1]]), shares_prompts=True)
    assert shared.pairs.tolist() == expected.pairs.tolist()
    apart = measured_trees(dataset, ("chosen_ids", "rejected_ids"), None, shares_prompts=False)
    assert apart.tokens.tolist() == [7, 3, 3]


def test_sequences_of_a_packed_row_do_not_see_each_other():
    rows = {"input_ids": [[1] * 5, [1] * 5], "labels": [[1] * 5, [1] * 5], "seq_lengths": [[5], [2, 3]]}
    sizes = measured_trees(Dataset.from_dict(rows), ("input_ids",), 5, shares_prompts=False)
    assert sizes.tokens.tolist() == sizes.scored.tolist() == [5, 5]
    assert sizes.pairs.tolist() == [12.5, (4 + 9) / 2]


def test_turns_of_a_row_share_what_they_begin_with():
    turns = [[*range(20), 30, 31], [*range(20), 40, 41, 42], [50, 51]]
    labels = [[-100] * (len(ids) - 1) + ids[-1:] for ids in turns]
    row = joined_rows({"input_ids": ids, "labels": each} for ids, each in zip(turns, labels, strict=True))
    dataset = Dataset.from_list([joined_rows([{"input_ids": [7] * 4, "labels": [7] * 4}]), row])
    sizes = measured_trees(dataset, ("input_ids",), None, shares_prompts=True)
    collate = LabelledCollator(0, "shared_prefix", joins=True).collate
    assert sizes.tokens.tolist() == [collate([row]).input_ids.numel() for row in dataset] == [4, 27]
    assert sizes.pairs.tolist() == [8, 20 * 10 + 2 * 21 + 3 * 21.5 + 2]


def test_no_rows_have_no_sizes():
    empty = Dataset.from_dict({"input_ids": []})
    assert measured_trees(empty, ("input_ids",), None, shares_prompts=False).tokens.tolist() == []
