"""Real processes, killed with −9 at random moments and while they save, end where an undisturbed one does."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import trl_fast
from support.killing import Forks
from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.training import color_labels, color_pairs, make_trainer
from trl_fast.trainers.checkpoints.files import find_fault
from trl_fast.trainers.checkpoints.folders import checkpoint_folders

pytestmark = pytest.mark.processes

STEPS = 6
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "learning_rate": 1e-2,
}


def judge(completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def arguments_and_settings(method, model_path, reward_model_path, tokenizer):
    if method == "SFT":
        return {"model": model_path, "train_dataset": sft_rows("prompt and completion", 7)}, {}
    if method == "DPO":
        return {"model": model_path, "train_dataset": color_pairs(7)}, {
            "sync_ref_model": True,
            "ref_model_sync_steps": 2,
        }
    if method == "KTO":
        return {"model": model_path, "train_dataset": color_labels(7)}, {}
    if method == "Reward":
        arguments = {"model": reward_model_path, "train_dataset": color_pairs(7), "processing_class": tokenizer}
        return arguments, {}
    arguments = {"model": model_path, "train_dataset": color_prompts(7)}
    if method == "PPO":
        settings = {"response_length": 3, "num_ppo_epochs": 1, "num_sample_generations": 0, "kl_target": 1.0}
        return {**arguments, "reward_model": judge, "processing_class": tokenizer}, settings
    settings = {"num_generations": 2, "max_completion_length": 3, "steps_per_generation": 2, "beta": 0.1}
    return {**arguments, "reward_funcs": judge}, settings


def final_state(folder):
    """Returns weights and optimizer of the last checkpoint, by name."""
    last = folder / f"checkpoint-{STEPS}"
    assert find_fault(last) is None
    found = {str(path.name): load_file(path) for path in last.rglob("*.safetensors")}
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return found | {f"optimizer {index}": state for index, state in optimizer.items()}


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("SFT", 5),
        *(
            pytest.param(method, 15, marks=pytest.mark.slow, id=f"{method} often")
            for method in ("SFT", "DPO", "KTO", "Reward", "GRPO", "PPO")
        ),
    ],
)
def test_killed_runs_end_where_an_undisturbed_one_does(
    method, kills, model_path, reward_model_path, tokenizer, tmp_path
):
    arguments, settings = arguments_and_settings(method, model_path, reward_model_path, tokenizer)
    folder = tmp_path / "run"
    trainer = make_trainer(trl_fast, folder, method=method, arguments=arguments, **{**SETTINGS, **settings})
    forks = Forks(trainer, folder)
    seconds = forks.finish()
    wanted = final_state(folder)
    chance, killed, ended = random.Random(method), 0, 0
    while killed < kills:
        # Ended before it was killed, or all steps are saved: the run begins anew.
        if (folder / f"checkpoint-{STEPS}").exists():
            assert_same(final_state(folder), wanted)
            shutil.rmtree(folder)
            folder.mkdir()
            ended += 1
        killed += forks.kill(chance, seconds)
        # What is named as a checkpoint is whole at every moment.
        assert [find_fault(path) for path in checkpoint_folders(folder)].count(None) == len(checkpoint_folders(folder))
    forks.finish()
    assert_same(final_state(folder), wanted)
    assert not list(folder.glob("tmp-*"))
    print(f"{method}: {killed} kills, {ended + 1} runs compared")


def assert_same(got, wanted):
    assert set(got) == set(wanted)
    for name, tensors in wanted.items():
        assert all(torch.equal(got[name][key], value) for key, value in tensors.items()), name
