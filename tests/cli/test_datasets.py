"""Datasets from files, folders and saved datasets."""

from pathlib import Path

import numpy as np
import pytest
import trl
from datasets import IterableDataset

import trl_fast
from support.training import color_pairs
from trl_fast.cli.arguments import DatasetMixtureConfig, ScriptArguments
from trl_fast.cli.datasets import get_dataset, load_split, load_train_and_test

WRITERS = {"jsonl": "to_json", "json": "to_json", "parquet": "to_parquet", "csv": "to_csv"}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_file_format(ending, tmp_path):
    path = tmp_path / f"pairs.{ending}"
    getattr(color_pairs(6), WRITERS[ending])(str(path))
    assert load_split(ScriptArguments(str(path)), "train")[:] == color_pairs(6)[:]


def test_a_folder_with_a_file_a_split(tmp_path):
    color_pairs(6).to_json(str(tmp_path / "train.jsonl"))
    color_pairs(3).to_json(str(tmp_path / "test.jsonl"))
    assert len(load_split(ScriptArguments(str(tmp_path)), "test")) == 3
    assert len(load_split(ScriptArguments(str(tmp_path)), "train[:50%]")) == 3


def test_streaming(tmp_path):
    color_pairs(6).to_json(str(tmp_path / "train.jsonl"))
    stream = load_split(ScriptArguments(str(tmp_path), dataset_streaming=True), "train")
    assert isinstance(stream, IterableDataset) and next(iter(stream)) == color_pairs(1)[0]


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="dataset_name is missing"):
        load_split(ScriptArguments(), "train")
    with pytest.raises(ValueError, match="dataset_name='.*nothing.jsonl'.*no such file"):
        load_split(ScriptArguments(str(tmp_path / "nothing.jsonl")), "train")
    (tmp_path / "pairs.txt").write_text("a")
    with pytest.raises(ValueError, match="expected a file ending in"):
        load_split(ScriptArguments(str(tmp_path / "pairs.txt")), "train")
    color_pairs(6).to_json(str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match="has no split 'test'.*dataset_test_split"):
        load_split(ScriptArguments(str(tmp_path)), "test")
    color_pairs(6).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(ValueError, match="mixes file formats"):
        load_split(ScriptArguments(str(tmp_path)), "test")


@pytest.fixture
def two_files(tmp_path):
    color_pairs(10).to_json(str(tmp_path / "a.jsonl"))
    color_pairs(6).add_column("extra", [1] * 6).to_json(str(tmp_path / "b.jsonl"))
    return str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")


COLUMNS = ["prompt", "chosen", "rejected"]
MIXTURES = {
    "all rows": ([{}, {"columns": COLUMNS}], {}),
    "fractions": ([{"fraction": 0.75}, {"columns": COLUMNS, "fraction": 0.5}], {}),
    "one left out": ([{"fraction": 0.0}, {"columns": COLUMNS, "fraction": 2}], {}),
    "slices": ([{"split": "train[:3]"}, {"columns": COLUMNS, "split": "train[-2:]"}], {}),
    "test split": ([{}, {"columns": COLUMNS}], {"test_split_size": 0.25}),
    "streams": ([{}, {"columns": COLUMNS}], {"streaming": True}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_has_trls_rows(case, two_files):
    entries, settings = MIXTURES[case]
    datasets = [{"path": "json", "data_files": file, **entry} for file, entry in zip(two_files, entries, strict=True)]
    results = []
    for module in (trl_fast, trl):
        np.random.seed(0)
        parts = module.get_dataset(module.DatasetMixtureConfig(datasets=[dict(d) for d in datasets], **settings))
        results.append({name: list(part) for name, part in parts.items()})
    assert results[0] == results[1]


def test_a_mixture_takes_files_by_path(two_files):
    mixture = DatasetMixtureConfig([{"path": two_files[0]}, {"path": two_files[1], "columns": COLUMNS}])
    assert len(get_dataset(mixture)["train"]) == 16


@pytest.mark.parametrize(
    "entries, settings, message",
    [
        ([], {}, "datasets is empty"),
        ([{}, {"fraction": 0.5}], {}, "datasets.0: fraction must be set for all datasets or for none"),
        (
            [{"fraction": -1}, {"fraction": 0.5}],
            {},
            r"datasets.0.fraction: expected a finite number >= 0 or None, got -1",
        ),
        ([{"fraction": 1}], {"streaming": True}, "fraction needs datasets of known length"),
        ([{}], {"streaming": True, "test_split_size": 2}, "test_split_size needs datasets of known length"),
        ([{"columns": {"text": "prompt"}}], {}, r"datasets.0.columns: expected a list of columns to keep, got \{"),
        ([{"split": "dev"}], {}, r"datasets.0.path='.*a.jsonl' has no split 'dev'"),
    ],
)
def test_bad_mixtures(entries, settings, message, two_files):
    datasets = [{"path": two_files[0], **entry} for entry in entries]
    with pytest.raises(ValueError, match=message):
        get_dataset(DatasetMixtureConfig(datasets, **settings))


def test_a_size_of_a_split_without_a_mixture_is_named(two_files):
    with pytest.raises(ValueError, match="test_split_size=0.5 is for a mixture, and there is none"):
        load_train_and_test(ScriptArguments(two_files[0]), DatasetMixtureConfig(test_split_size=0.5), with_test=True)


def test_a_name_with_brackets_is_no_pattern(two_files, tmp_path):
    file = tmp_path / "täxts [1]*.jsonl"
    file.write_bytes(Path(two_files[0]).read_bytes())
    train, _ = load_train_and_test(ScriptArguments(str(file)), DatasetMixtureConfig(), with_test=False)
    assert len(train) == 10


def test_a_mixture_wins_over_dataset_name_and_gives_both_splits(two_files, caplog):
    mixture = DatasetMixtureConfig([{"path": two_files[0]}], test_split_size=2)
    train, test = load_train_and_test(ScriptArguments(two_files[1]), mixture, with_test=True)
    assert (len(train), len(test)) == (8, 2) and "the mixture of `datasets` is used" in caplog.text
    mixture.test_split_size = None
    with pytest.raises(ValueError, match="no split 'test'; set test_split_size"):
        load_train_and_test(ScriptArguments(), mixture, with_test=True)
    assert load_train_and_test(ScriptArguments(two_files[0]), DatasetMixtureConfig(), with_test=False)[1] is None


def test_a_configuration_of_a_dataset_is_looked_up(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        color_pairs(4 if name == "en" else 5).to_json(str(tmp_path / name / "train.jsonl"))
    configs = "\n".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert len(load_split(ScriptArguments(str(tmp_path), dataset_config="de"), "train")) == 5
