"""KTO in two processes against TRL's in two: means over rows of both, and one KL estimate."""

import pytest
import trl

import trl_fast
from support.ranks import run_on_ranks
from support.training import assert_same_logs, color_labels, make_trainer

pytestmark = pytest.mark.processes


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


@pytest.mark.slow
def test_two_processes(model_path, tmp_path):
    ours, theirs = (
        run_on_ranks(train, module, model_path, tmp_path / module.__name__)[0] for module in (trl_fast, trl)
    )
    assert_same_logs(ours, theirs)
