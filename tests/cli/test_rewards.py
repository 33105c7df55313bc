"""`trl-fast grpo` and `trl-fast rloo`, as a person runs them."""

import json
import shlex
import sys

import pytest
from transformers import AutoModelForCausalLM

from support.rollouts import color_prompts
from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --num_generations 2 --max_completion_length 4 --max_steps 2 --logging_steps 1 "
    "--use_cpu true --bf16 false --report_to none --dataloader_pin_memory false --gradient_accumulation_steps 1"
)
MY_REWARD = "def count_words(completions, **kwargs):\n    return [len(text.split()) for text in completions]\n"


@pytest.fixture
def run(model_path, tmp_path, monkeypatch):
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in color_prompts(8)))
    (tmp_path / "my_rewards.py").write_text(MY_REWARD)
    (tmp_path / "exits.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    # Another test's module of this name.
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)

    def run(method, *flags):
        paths = f"--model_name_or_path {model_path} --dataset_name {data} --output_dir {tmp_path / 'run'}"
        return main([method, *paths.split(), *SETTINGS, *flags])

    return run


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_it_trains_and_saves(method, run, tmp_path, capsys, reward_model_path):
    rewards = ["--reward_funcs", "my_rewards.count_words", "--reward_model_name_or_path", reward_model_path]
    assert run(method, *rewards) == 0
    output = capsys.readouterr().out
    for expected in ("rewards/count_words/mean", "completions/mean_length", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "reward_funcs is missing"),
        (["--reward_funcs", "acuracy_reward"], "did you mean 'accuracy_reward'"),
        (["--reward_funcs", "my_rewards.count_letters"], "'my_rewards.count_letters' cannot be imported"),
        (["--reward_funcs", "no_such_module.reward"], "'no_such_module.reward' cannot be imported"),
        (["--reward_funcs", "exits.reward"], "'exits.reward' cannot be imported: SystemExit"),
        (["--reward_funcs", "my_rewards.count_words", "--num_generations", "3"], "num_generations=3 does not divide"),
    ],
)
def test_an_error_is_one_line_and_status_2(flags, message, run, capsys):
    assert run("grpo", *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-fast grpo:")]
    assert len(error) == 1 and message in error[0]
