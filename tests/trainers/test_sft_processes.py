"""Two processes train as one does on the same rows: the loss is a mean over the learned tokens of both."""

import pytest

import trl_fast
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.training import assert_same_logs, make_trainer

pytestmark = pytest.mark.processes


def train(model_path, folder, batch_size, **settings):
    """The logs of a short run. The rows are of very different lengths, so a mean of means would be another number."""
    arguments = {"model": model_path, "train_dataset": sft_rows("prompt and completion", 16)}
    settings |= {"per_device_train_batch_size": batch_size, "max_steps": 2}
    trainer = make_trainer(trl_fast, folder, method="SFT", arguments=arguments, **settings)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


QUICK = [("ddp", "nll"), ("ddp", "dft"), ("fsdp1", "nll")]
REST = [("fsdp1", "dft"), ("zero2", "nll"), ("zero2", "dft")]


@pytest.mark.parametrize(
    ("engine", "loss_type"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_two_processes_train_as_one(engine, loss_type, model_path, tmp_path):
    def two():
        return train(model_path, tmp_path / "two", 2, loss_type=loss_type)

    first, second = run_on_ranks(two, engine=engine)
    one = train(model_path, tmp_path / "one", 4, loss_type=loss_type)
    assert_same_logs(first, one, rel=5e-7, abs=1e-7)
    assert_same_logs(second, one, rel=5e-7, abs=1e-7)
