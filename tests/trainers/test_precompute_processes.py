"""Reference log-probs that two processes precompute: what one does, and what is computed as training goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from datasets import Dataset

import trl_fast
from support.training import assert_same_logs, color_labels, color_pairs, make_trainer
from trl_fast.trainers.base.reference import ReferenceTrainer

TESTS = Path(__file__).parent.parent
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
    calls, score = [], ReferenceTrainer.score_reference
    with patch.object(ReferenceTrainer, "score_reference", lambda *args: calls.append(1) or score(*args)):
        trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **sizes, **settings)
    trainer.train()
    trainer.evaluate()
    prepared = trainer.train_dataset
    return {
        "logs": trainer.state.log_history,
        "columns": {name: list(prepared[name]) for name in trainer.reference_columns if name in prepared.column_names},
        "calls": len(calls),
    }


@pytest.fixture(scope="module")
def two(model_path, tmp_path_factory):
    """Returns the findings of each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    for name, (_, make_rows, _) in CASES.items():
        make_rows(16).save_to_disk(folder / "data" / name)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
        + [model_path, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_precompute_what_one_does(case, two, model_path, tmp_path):
    first, second = (found[case] for found in two)
    for kind in ("in memory", "on disk", "from the cache"):
        assert first[kind]["columns"] == second[kind]["columns"] == first["in memory"]["columns"]
        assert_same_logs(first[kind]["logs"], first["as it goes on"]["logs"], rel=1e-5)
    # Each process its share, of the evaluation rows, which have no files, every time.
    assert [first[kind]["calls"] for kind in ("in memory", "on disk", "from the cache")] == [5, 5, 2]
    if case != "KTO with KL":
        one = train(case, model_path, tmp_path, batch_size=4)
        assert_same_logs(first["in memory"]["logs"], one["logs"], rel=1e-5)
        for name, values in one["columns"].items():
            assert first["in memory"]["columns"][name] == pytest.approx(values, rel=1e-6)


if __name__ == "__main__":
    model_path, folder = sys.argv[1:]
    found = {}
    for case in CASES:
        data = str(Path(folder, "data", case))
        kinds = {"in memory": {}, "on disk": {"data": data}, "from the cache": {"data": data}}
        kinds["as it goes on"] = {"precompute_ref_log_probs": False}
        found[case] = {
            kind: train(case, model_path, folder, batch_size=2, ddp_backend="gloo", **options)
            for kind, options in kinds.items()
        }
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
