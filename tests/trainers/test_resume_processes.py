"""Two processes that go on from a checkpoint of the second epoch: rows, losses and weights of the unbroken run."""

import pytest
import torch

import trl_fast
from support.ranks import run_on_ranks
from support.rollouts import brevity, color_prompts
from support.supervised import sft_rows
from support.training import make_trainer

pytestmark = pytest.mark.processes

# Epochs of four steps; GRPO's checkpoint is within a generation.
ONLINE = {"num_generations": 2, "max_completion_length": 4, "steps_per_generation": 2, "beta": 0.1}
CASES = {
    "SFT": {"train_dataset": sft_rows("prompt and completion", 16)},
    "GRPO": {"train_dataset": color_prompts(8), "reward_funcs": brevity, **ONLINE},
}


def train(method, model_path, folder, step=None):
    """Losses and weights at the end, from the beginning or from the checkpoint of a step."""
    given = CASES[method]
    arguments = {"model": model_path, **{name: given[name] for name in given if name not in ONLINE}}
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 7, "logging_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 5, "ddp_backend": "gloo"}
    settings |= {name: given[name] for name in given if name in ONLINE}
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **settings)
    trainer.train(resume_from_checkpoint=step and f"{folder}/checkpoint-{step}")
    return {
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()]),
    }


@pytest.mark.slow
def test_two_processes_resumed_after_the_first_epoch(model_path, tmp_path):
    def both():
        return {method: [train(method, model_path, tmp_path / method, step) for step in (None, 5)] for method in CASES}

    for found in run_on_ranks(both):
        for method, (whole, resumed) in found.items():
            assert whole["losses"] == resumed["losses"], method
            assert torch.equal(whole["weights"], resumed["weights"]), method
