"""pack_dataset and truncate_dataset against TRL's, row by row."""

import random

import pytest
import trl
from datasets import Dataset, DatasetDict, Features, IterableDataset, LargeList, List, Value
from trl.experimental.utils import truncate_dataset as trl_truncate_dataset

from trl_fast.data import pack_dataset, truncate_dataset


def rows(count, longest, seed=0, shortest=0):
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(1000) for _ in range(length)] for length in lengths]


def dataset_of(ids):
    return Dataset.from_dict({"input_ids": ids, "labels": [[-token for token in row] for row in ids]})


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("longest", "seq_length"), [(7, 7), (40, 16), (9, 30), (300, 64)])
def test_packs_as_trl_does(strategy, seed, longest, seq_length):
    dataset = dataset_of(rows(150, longest, seed))
    ours = pack_dataset(dataset, seq_length, strategy)
    theirs = trl.pack_dataset(dataset, seq_length, strategy)
    assert ours.features == theirs.features
    assert ours[:] == theirs[:]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_several_batches_and_large_lists(strategy):
    ids = rows(700, 20, shortest=1)
    features = Features({"input_ids": LargeList(Value("int32")), "labels": LargeList(Value("int64"))})
    dataset = Dataset.from_dict({"input_ids": ids, "labels": ids}, features=features).select(range(100, 700))
    options = {"batch_size": 64}
    ours, theirs = (pack(dataset, 24, strategy, options) for pack in (pack_dataset, trl.pack_dataset))
    assert ours.features == theirs.features
    assert ours[:] == theirs[:]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_streams_and_dicts(strategy):
    dataset = dataset_of(rows(50, 20))
    stream = pack_dataset(dataset.to_iterable_dataset(), 24, strategy)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(trl.pack_dataset(dataset, 24, strategy))
    assert pack_dataset(DatasetDict(train=dataset), 24, strategy)["train"][:] == Dataset.from_list(list(stream))[:]


def test_the_format_stays():
    dataset = dataset_of(rows(20, 9)).with_format("torch", columns=["input_ids"])
    assert pack_dataset(dataset, 12).format == trl.pack_dataset(dataset, 12).format
    assert truncate_dataset(dataset, 4).format == trl_truncate_dataset(dataset, 4).format


def test_nothing_is_lost_when_pieces_are_packed():
    ids = rows(200, 90)
    packed = pack_dataset(dataset_of(ids), 32, "bfd_split")
    assert sorted(sum(ids, [])) == sorted(sum(packed["input_ids"], []))
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 32 for row in packed)


def test_only_empty_rows():
    assert pack_dataset(dataset_of([[1]]).select([]), 8).num_rows == 0
    assert pack_dataset(Dataset.from_dict({"input_ids": [[], []]}, Features({"input_ids": List(Value("int64"))})), 8)[
        :
    ] == {"input_ids": [], "seq_lengths": []}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="strategy='wrap'.*bfd, bfd_split, wrapped"):
        pack_dataset(dataset_of([[1]]), 8, "wrap")
    with pytest.raises(TypeError, match="'text'.*string"):
        pack_dataset(Dataset.from_dict({"text": ["a"]}), 8)
    with pytest.raises(ValueError, match="'labels' has 2 elements in row 1.*'input_ids' has 1"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1], [2]], "labels": [[1], [2, 3]]}), 8)


@pytest.mark.parametrize("max_length", [1, 5, 100])
def test_truncates_as_trl_does(max_length):
    dataset = dataset_of(rows(60, 20)).add_column("text", ["long enough"] * 60)
    assert truncate_dataset(dataset, max_length)[:] == trl_truncate_dataset(dataset, max_length)[:]
    assert list(truncate_dataset(dataset.to_iterable_dataset(), max_length)) == list(
        truncate_dataset(dataset, max_length)
    )


@pytest.mark.parametrize(("older", "now"), [("ffd", "bfd"), ("bfd-requeue", "bfd_split")])
def test_older_names_of_strategies(older, now):
    dataset = dataset_of(rows(30, 20))
    with pytest.warns(FutureWarning, match=f"'{older}' is now called '{now}'"):
        packed = pack_dataset(dataset, 16, older)
    assert packed[:] == pack_dataset(dataset, 16, now)[:]
