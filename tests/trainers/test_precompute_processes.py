"""Reference log-probs that two processes precompute: what one does, and what is computed as training goes on."""

from unittest.mock import patch

import pytest
from datasets import Dataset

import trl_fast
from support.ranks import run_on_ranks
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer
from trl_fast.trainers.base.reference import ReferencePolicy

pytestmark = pytest.mark.processes

CASES = {
    "DPO": ("DPO", color_pairs, {}),
    # Without the KL estimate, whose rows are paired within a process's batch.
    "KTO": ("KTO", color_labels, {"loss_type": "apo_zero_unpaired"}),
    "KTO with KL": ("KTO", color_labels, {}),
}


def train(case, model_path, folder, *, batch_size, data=None, **settings):
    """The logs of a short run and its reference columns, which it reads from or leaves beside the dataset `data`."""
    method, make_rows, options = CASES[case]
    rows = make_rows(16) if data is None else Dataset.load_from_disk(data)
    arguments = {"model": model_path, "train_dataset": rows, "eval_dataset": make_rows(8)}
    settings = {"precompute_ref_log_probs": True, "num_train_epochs": 2, "max_steps": -1, **options, **settings}
    # Global batches are the same, and whole; those in which references are computed are not.
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    sizes |= {"precompute_ref_batch_size": 3, "gradient_accumulation_steps": 1}
    calls, score = [], ReferencePolicy.score
    with patch.object(ReferencePolicy, "score", lambda *args: calls.append(1) or score(*args)):
        trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **sizes, **settings)
    trainer.train()
    trainer.evaluate()
    prepared = trainer.train_dataset
    return {
        "logs": trainer.state.log_history,
        "columns": {name: list(prepared[name]) for name in trainer.reference_columns if name in prepared.column_names},
        "calls": len(calls),
    }


def train_each_way(case, model_path, folder):
    """The findings of a run by how it gets references: from memory, a file, that file's cache, or as it goes on."""
    data = str(folder / "data")
    kinds = {"in memory": {}, "on disk": {"data": data}, "from the cache": {"data": data}}
    kinds["as it goes on"] = {"precompute_ref_log_probs": False}
    return {kind: train(case, model_path, folder, batch_size=2, **options) for kind, options in kinds.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_precompute_what_one_does(case, model_path, tmp_path):
    CASES[case][1](16).save_to_disk(tmp_path / "data")
    first, second = run_on_ranks(train_each_way, case, model_path, tmp_path)
    for kind in ("in memory", "on disk", "from the cache"):
        assert first[kind]["columns"] == second[kind]["columns"] == first["in memory"]["columns"]
        assert_same_logs(first[kind]["logs"], first["as it goes on"]["logs"], rel=1e-5)
    # Each process its share, of the evaluation rows, which have no files, every time.
    assert [first[kind]["calls"] for kind in ("in memory", "on disk", "from the cache")] == [5, 5, 2]
    if case != "KTO with KL":
        one = train(case, model_path, tmp_path / "one", batch_size=4)
        assert_same_logs(first["in memory"]["logs"], one["logs"], rel=1e-5)
        for name, values in one["columns"].items():
            assert first["in memory"]["columns"][name] == pytest.approx(values, rel=1e-6)
