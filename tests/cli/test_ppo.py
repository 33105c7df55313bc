"""`trl-fast ppo`, as a person runs it."""

import json
import shlex

import pytest
from transformers import AutoModelForCausalLM

from support.rollouts import color_prompts
from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --total_episodes 8 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3 --response_length 4 --stop_token eos "
    "--missing_eos_penalty 1.0 --num_ppo_epochs 1"
)


@pytest.fixture
def ppo(reward_model_path, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in color_prompts(8)))

    def ppo(*flags, reward=("--reward_model_path", reward_model_path)):
        paths = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
        return main(["ppo", *paths, *SETTINGS, *reward, *flags])

    return ppo


@pytest.mark.parametrize("flag", ["--sft_model_path", "--model_name_or_path"])
def test_it_trains_and_saves(flag, ppo, model_path, tmp_path, capsys):
    assert ppo(flag, model_path) == 0
    output = capsys.readouterr().out
    for expected in ("objective/scores", "loss/value_avg", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_reward_functions(ppo, model_path):
    assert ppo("--sft_model_path", model_path, reward=("--reward_funcs", "get_soft_overlong_punishment")) == 0


def test_an_error_is_one_line_and_status_2(ppo, model_path, capsys):
    assert ppo("--sft_model_path", model_path, "--lam", "2") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-fast ppo:")]
    assert len(error) == 1 and "lam: expected a finite number in [0, 1], got 2.0" in error[0]
