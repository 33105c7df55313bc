"""`--dry_run`: one step of a real run, of which nothing is left."""

import json
import shlex
from pathlib import Path

import pytest
from filelock import FileLock
from torch.optim.optimizer import register_optimizer_step_post_hook

from support.rollouts import color_prompts
from support.supervised import sft_rows
from support.training import color_pairs
from trl_fast.cli.dry_run import planned
from trl_fast.cli.main import main
from trl_fast.trainers.checkpoints.output_folder import LOCK_FILE
from trl_fast.trainers.run_report.forecast import Forecast

SETTINGS = shlex.split(
    "--use_cpu true --bf16 false --report_to none --dataloader_pin_memory false --per_device_train_batch_size 4 "
    "--max_length 64 --learning_rate 1e-3"
)
ROWS = {"sft": lambda: sft_rows("text"), "dpo": color_pairs, "grpo": color_prompts, "ppo": color_prompts}
ONLINE = {
    "grpo": "--reward_funcs get_soft_overlong_punishment --max_completion_length 4 --num_generations 2 "
    "--log_completions true",
    "ppo": "--reward_funcs get_soft_overlong_punishment --response_length 4 --stop_token eos --total_episodes 16",
}


@pytest.fixture
def dry_run(model_path, tmp_path, capsys):
    """Runs a method's command with --dry_run; returns exit status, standard output and standard error."""

    def dry_run(method, *flags, rows=None):
        data = tmp_path / "rows.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in (ROWS[method]() if rows is None else rows)))
        words = ["--model_name_or_path", model_path, "--dataset_name", str(data), *SETTINGS]
        words += [*ONLINE.get(method, "").split(), "--output_dir", str(tmp_path / "above" / "run")]
        status = main([method, *words, "--dry_run", *flags])
        shown = capsys.readouterr()
        return status, " ".join(shown.out.split()), shown.err

    return dry_run


@pytest.fixture
def optimizer_steps():
    """Lists the optimizers' steps as they are made."""
    made = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: made.append(optimizer))
    yield made
    handle.remove()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo", "ppo"])
def test_one_step_and_nothing_is_left(method, dry_run, tmp_path, optimizer_steps):
    status, out, _ = dry_run(method)
    # PPO's one step is all updates on a rollout: 4 epochs.
    assert status == 0 and len(optimizer_steps) == (4 if method == "ppo" else 1)
    assert f"Dry run of {method}: 1 of " in out and " s (the first one is slower" in out and " GiB of this" in out
    assert "Nothing is saved. Leave --dry_run out to train." in out and "Model saved" not in out
    assert not (tmp_path / "above").exists()


def test_what_a_plan_expects_is_told(dry_run):
    assert "the model is too small to simulate" in dry_run("dpo")[1]
    assert (
        planned(Forecast(3 << 30, 0.25, "an estimate")) == "Planned: peak memory 3.00 GiB, 0.25 s a step; an estimate."
    )
    assert planned(Forecast(None, None, "why not")) == "Planned: nothing; why not."


def test_it_makes_a_single_step_of_all_micro_batches(dry_run, optimizer_steps):
    status, out, _ = dry_run("dpo", "--gradient_accumulation_steps", "2", "--num_train_epochs", "2")
    assert status == 0 and len(optimizer_steps) == 1 and "1 of 6 steps" in out


def test_what_was_in_the_folder_stays_as_it_was(dry_run, tmp_path):
    folder = tmp_path / "above" / "run"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("a card")
    before = files(folder)
    status, _, _ = dry_run("dpo", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no")
    assert status == 0 and files(folder) == before


def test_it_goes_on_from_a_checkpoint(dry_run, tmp_path, model_path):
    words = ["--model_name_or_path", model_path, "--dataset_name", str(tmp_path / "rows.jsonl"), *SETTINGS]
    folder = tmp_path / "above" / "run"
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in color_pairs()))
    stops = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "2", "--output_dir", str(folder)]
    assert main(["dpo", *words, *stops]) == 0
    before = files(folder)
    status, out, _ = dry_run("dpo", "--max_steps", "3", "--resume_from_checkpoint", str(folder / "checkpoint-2"))
    assert status == 0 and "1 of 3 steps" in out and files(folder) == before


def test_data_that_fills_no_batch_is_told(dry_run):
    status, _, error = dry_run("grpo", "--dataset_streaming", "true", "--max_steps", "2", rows=color_prompts(1))
    assert status == 2 and "dry_run: there is no step to make" in error


def test_errors_are_those_of_a_run(dry_run, tmp_path):
    status, _, error = dry_run("dpo", rows=[{"prompt": "Why?", "chosen": "", "rejected": " no"}])
    assert status == 2 and "row 0" in error.strip().splitlines()[-1]
    assert not (tmp_path / "above").exists()
    status, _, error = dry_run("dpo", "--beta", "-1")
    assert status == 2 and "beta" in error


def test_a_folder_in_use_is_refused(dry_run, tmp_path):
    folder = tmp_path / "above" / "run"
    folder.mkdir(parents=True)
    with FileLock(folder / LOCK_FILE):
        status, _, error = dry_run("dpo")
    assert status == 2 and "is in use by" in error


def test_no_repository_is_made_on_the_hub(dry_run, monkeypatch):
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_, **__: pytest.fail("the hub is asked"))
    assert dry_run("dpo", "--push_to_hub", "true")[0] == 0
