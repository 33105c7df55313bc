"""The commands, as a person runs them."""

import os
import shlex
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --max_steps 4 --logging_steps 1 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3"
)


def dpo(model_path, pairs_file, output_dir, *flags):
    paths = ["--model_name_or_path", model_path, "--dataset_name", str(pairs_file), "--output_dir", str(output_dir)]
    return main(["dpo", *paths, *SETTINGS, *flags])


def test_env_prints_versions_backends_and_reasons(capsys):
    assert main(["env"]) == 0
    output = capsys.readouterr().out
    for expected in (torch.__version__, "triton", "need a CUDA device", "pure PyTorch, always there", "torch threads"):
        assert expected in output


def test_dpo_trains_evaluates_saves_and_goes_on(model_path, pairs_file, tmp_path, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train[:25%]"]
    output_dir = tmp_path / "run"
    assert dpo(model_path, pairs_file, output_dir, *evaluation, "--save_steps", "2") == 0
    output = capsys.readouterr().out
    for expected in ("rewards/margins", "eval_loss", "step 4", f"saved to {output_dir}"):
        assert expected in output
    trained = AutoModelForCausalLM.from_pretrained(output_dir)
    start = AutoModelForCausalLM.from_pretrained(model_path)
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}

    more = ["--resume_from_checkpoint", "true", "--max_steps", "5"]
    assert dpo(model_path, pairs_file, output_dir, *more) == 0
    output = capsys.readouterr().out
    assert "step 5: loss" in output and "step 4: loss" not in output


def test_dpo_with_lora_from_a_yaml_file(model_path, pairs_file, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {model_path}\ndataset_name: {pairs_file}\nuse_peft: true\nlora_r: 4\n"
        f"lora_target_modules: [q_proj]\noutput_dir: {tmp_path / 'run'}\nloss_type: [ipo]\n"
    )
    assert main(["dpo", "--config", str(config), *SETTINGS]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name", "nothing.jsonl"], "dataset_name='nothing.jsonl'"),
        (["--loss_type", "sigmoyd"], "sigmoyd"),
        (["--beta", "nan"], "beta: expected a finite number >= 0, got nan; left out, it is 0.1"),
        (["--lora_r", "0", "--use_peft"], "lora_r: expected an integer >= 1, got 0; left out, it is 16"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps: expected an integer >= 1, got 0"),
        (["--model_name_or_path", "no-such-model"], "no-such-model"),
    ],
)
def test_an_error_is_one_line_and_status_2(flags, message, model_path, pairs_file, tmp_path, capsys):
    assert dpo(model_path, pairs_file, tmp_path / "run", *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-fast dpo:")]
    assert len(error) == 1 and message in error[0]


def test_training_that_diverges_is_one_line_and_status_1(model_path, pairs_file, tmp_path, capsys):
    flags = ["--learning_rate", "1e30", "--max_grad_norm", "0", "--weight_decay", "1"]
    assert dpo(model_path, pairs_file, tmp_path / "run", *flags) == 1
    shown = capsys.readouterr()
    error = [line for line in shown.err.splitlines() if line.startswith("Training failed at step ")]
    assert len(error) == 1 and "weights are NaN or infinite since then" in error[0]
    assert "saved to" not in shown.out and not (tmp_path / "run" / "model.safetensors").exists()


def test_the_installed_command_runs():
    command = os.path.join(os.path.dirname(sys.executable), "trl-fast")
    result = subprocess.run([command, "dpo", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--loss_type" in result.stdout


@pytest.mark.parametrize("when", ["prepare", "run"])
def test_ctrl_c_has_no_traceback(when, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_fast.cli.main._prepare", interrupt if when == "prepare" else lambda *_: interrupt)
    assert main(["plan"]) == 130
    assert not capsys.readouterr().err
    if when == "run":
        with pytest.raises(KeyboardInterrupt):
            main(["run", "script.py"])
