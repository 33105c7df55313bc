"""`trl-fast kto`, as a person runs it."""

import json
import shlex

import pytest
from transformers import AutoModelForCausalLM

from support.training import color_labels
from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --max_steps 2 --logging_steps 1 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3"
)


@pytest.fixture
def kto(model_path, tmp_path):
    data = tmp_path / "labels.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in color_labels(12)))

    def kto(*flags):
        paths = [
            "--model_name_or_path",
            model_path,
            "--dataset_name",
            str(data),
            "--output_dir",
            str(tmp_path / "run"),
        ]
        return main(["kto", *paths, *SETTINGS, *flags])

    return kto


def test_it_trains_evaluates_and_saves(kto, tmp_path, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train[:25%]"]
    assert kto(*evaluation, "--undesirable_weight", "1.5") == 0
    output = capsys.readouterr().out
    for expected in ("rewards/rejected", "kl", "eval_loss", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_sampling_strategy", "random"], "train_sampling_strategy='random'"),
        (["--per_device_train_batch_size", "1"], "per_device_train_batch_size=1"),
        (["--max_length", "1"], "max_length=1"),
    ],
)
def test_an_error_is_one_line_and_status_2(flags, message, kto, capsys):
    assert kto(*flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-fast kto:")]
    assert len(error) == 1 and message in error[0]
