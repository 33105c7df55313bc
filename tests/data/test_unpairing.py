"""Unpairing gives the same rows in the same order as TRL's."""

import pytest
import trl
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

import trl_fast

ROWS = {
    "score": [3, 1, 2],
    "chosen": [" blue", " in the sky", ""],
    "prompt": ["The sky is", "The sun is", ""],
    "rejected": [" green", " in the sea", " x"],
    "source": ["a", "b", "c"],
}
WITHOUT_PROMPT = {name: ROWS[name] for name in ("chosen", "rejected")}
MESSAGES = {
    name: [[{"role": "user" if name == "prompt" else "assistant", "content": text}] for text in ROWS[name]]
    for name in ("prompt", "chosen", "rejected")
}


def same(ours, theirs):
    assert ours.column_names == theirs.column_names
    assert list(ours) == list(theirs)
    assert getattr(ours, "features", None) == getattr(theirs, "features", None)


@pytest.mark.parametrize("rows", [ROWS, WITHOUT_PROMPT, MESSAGES], ids=["more columns", "no prompt", "messages"])
@pytest.mark.parametrize("name", ["unpair_preference_dataset", "maybe_unpair_preference_dataset"])
def test_datasets(rows, name):
    ours, theirs = getattr(trl_fast, name), getattr(trl, name)
    dataset = Dataset.from_dict(rows)
    same(ours(dataset), theirs(dataset))
    split = DatasetDict(train=dataset, test=dataset.select([1]))
    for part in split:
        same(ours(split)[part], theirs(split)[part])


def test_batches_are_unpaired_one_by_one():
    dataset = Dataset.from_dict(ROWS)
    ours = trl_fast.unpair_preference_dataset(dataset, batch_size=2)
    same(ours, trl.unpair_preference_dataset(dataset, batch_size=2))
    assert ours["label"] == [True, True, False, False, True, False]


def test_streams():
    stream = Dataset.from_dict(ROWS).to_iterable_dataset()
    without_names = IterableDataset.from_generator(lambda: iter(Dataset.from_dict(ROWS)))
    for dataset in (stream, without_names):
        assert list(trl_fast.unpair_preference_dataset(dataset)) == list(trl.unpair_preference_dataset(dataset))
    assert len(list(trl_fast.maybe_unpair_preference_dataset(stream, num_proc=2, desc="unpairing"))) == 6
    split = trl_fast.maybe_unpair_preference_dataset(IterableDatasetDict(train=stream))
    assert len(list(split["train"])) == 6


def test_what_is_not_paired_comes_back_as_it_is():
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": [True]})
    assert trl_fast.maybe_unpair_preference_dataset(dataset) is dataset
    pairs = Dataset.from_dict(WITHOUT_PROMPT)
    assert len(trl_fast.maybe_unpair_preference_dataset(pairs, num_proc=1, desc="unpairing")) == 6
