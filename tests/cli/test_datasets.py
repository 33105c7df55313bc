"""Datasets from files, folders and saved datasets."""

import pytest
from datasets import IterableDataset

from support.training import color_pairs
from trl_fast.cli.arguments import ScriptArguments
from trl_fast.cli.datasets import load_split

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
