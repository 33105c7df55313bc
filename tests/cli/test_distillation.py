"""`trl-fast distillation`, `gkd`, `gold` and `server_distillation`, as a person runs them."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from support.rollouts import color_prompts
from support.teacher_server import teacher_server
from support.tokenizer import build_tokenizer
from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 2 --max_steps 2 --logging_steps 1 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3 --gradient_accumulation_steps 2"
)
LENGTHS = {
    "distillation": "--max_completion_length",
    "gkd": "--max_new_tokens",
    "gold": "--max_completion_length",
}
OF_SERVERS = {"server_distillation": "--max_completion_length"}


@pytest.fixture(scope="session")
def teacher_path(model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.2)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model_path, teacher_path, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": row["prompt"], "completion": f" It is {row['shade']}"} for row in color_prompts(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def run(command, *flags, teacher=("--teacher_model_name_or_path", teacher_path)):
        paths = [
            "--model_name_or_path",
            model_path,
            "--dataset_name",
            str(data),
            "--output_dir",
            str(tmp_path / "run"),
        ]
        return main([command, *paths, *teacher, {**LENGTHS, **OF_SERVERS}[command], "4", *SETTINGS, *flags])

    return run


@pytest.mark.parametrize("command", LENGTHS)
def test_it_trains_evaluates_and_saves(command, run, tmp_path, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train[:50%]"]
    assert run(command, "--beta", "0.5", *evaluation) == 0
    output = capsys.readouterr().out
    for expected in ("entropy", "completions/mean_length", "eval_loss", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_one_step_and_a_preview(run, model_path, tmp_path, capsys):
    assert run("distillation", "--dry_run") == 0
    assert "Dry run of distillation: 1 of 2 steps" in capsys.readouterr().out
    data = str(tmp_path / "rows.jsonl")
    for command, shown in (("distillation", "prompt"), ("gkd", "completion")):
        words = ["--model_name_or_path", model_path, "--dataset_name", data, "--output_dir", str(tmp_path / "run")]
        words += [LENGTHS[command], "4"]
        assert main(["preview", command, *words, "--use_cpu", "true", "--bf16", "false"]) == 0, capsys.readouterr().err
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("distillation", ["--beta", "1.5"], "beta: expected a finite number in [0, 1], got 1.5"),
        ("distillation", ["--teacher_top_k", "5000"], "teacher_top_k=5000 is more than the"),
        ("gold", ["--use_uld_loss", "true", "--seq_kd", "true"], "seq_kd=True with use_uld_loss=True"),
        ("gkd", ["--lmbda", "-1"], "lmbda: expected a finite number in [0, 1], got -1.0"),
    ],
)
def test_an_error_is_one_line_and_status_2(command, flags, message, run, capsys):
    assert run(command, *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"trl-fast {command}:")]
    assert len(error) == 1 and message in error[0]


def test_a_teacher_is_needed(run, capsys):
    assert run("distillation", teacher=()) == 2
    assert "teacher_model is missing" in capsys.readouterr().err


def test_a_teacher_that_is_served(run, teacher_path, tmp_path, capsys):
    with teacher_server(teacher_path) as server:
        url = ("--teacher_model_server_url", server.url)
        assert run("server_distillation", "--beta", "0.5", teacher=url) == 0
        assert f"saved to {tmp_path / 'run'}" in capsys.readouterr().out
        assert run("server_distillation", "--loss_top_k", "3", teacher=url) == 2
        assert "loss_top_k=3 with beta=1.0" in capsys.readouterr().err
    assert run("server_distillation", "--teacher_server_timeout", "0", teacher=url) != 0
    error = capsys.readouterr().err
    assert f"the vLLM server at {server.url} cannot be reached" in error and "Traceback" not in error
