"""Two processes train as one does on the same rows; the smallest and largest rewards are those of both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_fast
from support.training import assert_same_logs, color_pairs, make_trainer

TESTS = Path(__file__).parent.parent


def train(model_path, folder, batch_size, **settings):
    """The logs of a short run and of an evaluation after it."""
    arguments = {"model": model_path, "train_dataset": color_pairs(16), "eval_dataset": color_pairs(8)}
    settings |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "max_steps": 2}
    trainer = make_trainer(trl_fast, folder, method="Reward", arguments=arguments, **settings)
    trainer.train()
    trainer.evaluate()
    return [log for log in trainer.state.log_history if "train_runtime" not in log]


@pytest.mark.slow
def test_two_processes_train_as_one(model_path, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [*launcher, __file__, model_path, str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads((tmp_path / "two/logs.json").read_text())
    assert_same_logs(logs, train(model_path, tmp_path / "one", 4), rel=1e-5)


if __name__ == "__main__":
    model_path, folder = sys.argv[1:]
    logs = train(model_path, folder, 2, ddp_backend="gloo")
    if os.environ["RANK"] == "0":
        Path(folder, "logs.json").write_text(json.dumps(logs))
