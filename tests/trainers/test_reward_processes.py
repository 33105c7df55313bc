"""Two processes train as one does on the same rows; the smallest and largest rewards are those of both."""

import pytest

import trl_fast
from support.ranks import run_on_ranks
from support.training import assert_same_logs, color_pairs, make_trainer

pytestmark = pytest.mark.processes


def train(model_path, folder, batch_size, **settings):
    """The logs of a short run and of an evaluation after it."""
    arguments = {"model": model_path, "train_dataset": color_pairs(16), "eval_dataset": color_pairs(8)}
    settings |= {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "max_steps": 2}
    trainer = make_trainer(trl_fast, folder, method="Reward", arguments=arguments, **settings)
    trainer.train()
    trainer.evaluate()
    return [log for log in trainer.state.log_history if "train_runtime" not in log]


def test_two_processes_train_as_one(model_path, tmp_path):
    logs = run_on_ranks(lambda: train(model_path, tmp_path / "two", 2, ddp_backend="gloo"))[0]
    assert_same_logs(logs, train(model_path, tmp_path / "one", 4), rel=1e-5)
