"""KTO in two processes against TRL's in two: means over rows of both, and one KL estimate."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.training import assert_same_logs, color_labels, make_trainer

TESTS = Path(__file__).parent.parent


def logs_in_two_processes(module, model_path, folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*launcher, __file__, module, model_path, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "logs.json").read_text())


@pytest.mark.slow
def test_two_processes(model_path, tmp_path):
    ours, theirs = (logs_in_two_processes(name, model_path, tmp_path / name) for name in ("trl_fast", "trl"))
    assert_same_logs(ours, theirs)


def train(module, model_path, folder):
    """A short run and an evaluation after it.

    The first batch has only good completions on one process, and all the long prompts, which alone would do to score
    own and other completions in one pass.
    """
    rows = color_labels(16).map(
        lambda row, index: {"prompt": row["prompt"] * (12 if index % 8 < 4 else 1)}, with_indices=True
    )
    arguments = {"model": model_path, "train_dataset": rows, "eval_dataset": color_labels(8)}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = make_trainer(module, folder, method="KTO", arguments=arguments, **sizes, max_steps=2, ddp_backend="gloo")
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


if __name__ == "__main__":
    name, model_path, folder = sys.argv[1:]
    logs = train(importlib.import_module(name), model_path, folder)
    if os.environ["RANK"] == "0":
        Path(folder, "logs.json").write_text(json.dumps(logs))
