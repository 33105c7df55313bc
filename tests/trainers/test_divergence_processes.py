"""A loss or a gradient that is NaN in one of two processes ends the training in both, and none waits for the other."""

import pytest

import trl_fast
from support.ranks import run_on_ranks
from support.supervised import sft_rows
from support.training import make_trainer
from trl_fast.trainers.base.divergence import DivergedError

pytestmark = pytest.mark.processes

CASES = {
    "loss": "step 2: the loss was nan; training ended with it",
    "gradient": "step 2: the loss was nan and the gradient's norm was nan; weights are NaN or infinite since then",
}


def train(model_path, folder, case):
    """The message of the error that ends a run in this process."""
    arguments = {"model": model_path, "train_dataset": sft_rows("text", 32)}
    settings = {"gradient_accumulation_steps": 1, "max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(trl_fast, folder, method="SFT", arguments=arguments, ddp_backend="gloo", **settings)
    compute_loss = trainer.compute_loss

    def compute(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if trainer.state.global_step == 0 or trainer.args.process_index == 0:
            return loss
        return loss * float("nan") if case == "gradient" else loss + float("nan")

    trainer.compute_loss = compute
    try:
        trainer.train()
    except DivergedError as error:
        return str(error)
    return "success"


@pytest.mark.parametrize("case", CASES)
def test_both_processes_end(case, model_path, tmp_path):
    for message in run_on_ranks(train, model_path, tmp_path, case):
        assert message.startswith(CASES[case])
    assert list(tmp_path.glob("checkpoint-*")) == ([tmp_path / "checkpoint-3"] if case == "loss" else [])
