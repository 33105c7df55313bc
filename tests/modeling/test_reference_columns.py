"""Precomputed columns beside a dataset: computed by all processes or by none, cached where a later run finds them."""

import pytest
import torch
from datasets import Dataset

from support.ranks import run_on_ranks
from trl_fast.modeling.reference_cache import with_reference_columns

ROWS = {"text": list("abcde")}
VALUES = {"ref": [0.5, 1.5, 2.5, 3.5, 4.5]}


class Process:
    """One that counts what it computes."""

    def __init__(self):
        self.computed = 0

    def add(self, dataset, *, writes=True, key=("key",)):
        def compute():
            self.computed += 1
            return VALUES

        found = with_reference_columns(dataset, key, compute, writes=writes)
        assert {name: list(found[name]) for name in found.column_names} == {**ROWS, **VALUES}


@pytest.fixture
def on_disk(tmp_path):
    Dataset.from_dict(ROWS).save_to_disk(tmp_path)
    return lambda: Dataset.load_from_disk(str(tmp_path))


def test_a_later_run_finds_them(on_disk):
    process = Process()
    for computed, key in ((1, ("key",)), (1, ("key",)), (2, ("other",))):
        process.add(on_disk(), key=key)
        assert process.computed == computed


def test_without_files_there_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.fingerprint.get_temporary_cache_files_directory", lambda: str(tmp_path))
    process, dataset = Process(), Dataset.from_dict(ROWS)
    process.add(dataset)
    process.add(dataset)
    assert process.computed == 2 and not list(tmp_path.iterdir())


def test_one_process_that_lacks_them_makes_all_compute_their_share(tmp_path):
    """Two machines with folders of their own, then with one folder."""

    def compute(name):
        torch.distributed.init_process_group("gloo")
        process = Process()
        folder = tmp_path / name.format(torch.distributed.get_rank())
        for _ in range(2):
            process.add(Dataset.load_from_disk(str(folder)), writes=name != "{}" or folder.name == "1")
        return process.computed, len(list(folder.glob("cache-*")))

    for name in ("0", "1", "one"):
        Dataset.from_dict(ROWS).save_to_disk(tmp_path / name)
    # Only the second machine keeps what it has computed, so the first has nothing to read, and both compute again.
    assert run_on_ranks(compute, "{}", engine=None) == [(2, 0), (2, 1)]
    assert run_on_ranks(compute, "one", engine=None) == [(1, 1), (1, 1)]
