"""`trl-fast orpo`, `cpo`, `tpo` and `bco`, as a person runs them."""

import json
import shlex

import pytest
from transformers import AutoModelForCausalLM

from support.reference_free import color_triples
from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --max_steps 1 --logging_steps 1 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3"
)


@pytest.fixture
def run(model_path, tmp_path):
    data = tmp_path / "triples.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in color_triples(8)))

    def run(command, *flags, trains=True):
        paths = ["--model_name_or_path", model_path, "--dataset_name", str(data)]
        settings = ["--output_dir", str(tmp_path / "run"), *SETTINGS] if trains else []
        return main([*command.split(), *paths, *settings, *flags])

    return run


@pytest.mark.parametrize(
    ("command", "metric"),
    [("orpo", "log_odds_chosen"), ("cpo", "nll_loss"), ("tpo", "mean_token_accuracy"), ("bco", "delta")],
)
def test_it_trains_evaluates_and_saves(command, metric, run, tmp_path, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "train[:25%]"]
    assert run(command, *evaluation) == 0
    output = capsys.readouterr().out
    for expected in (metric, "rewards/margins", "eval_loss", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_a_dry_run_and_a_preview(run, tmp_path, capsys):
    assert run("cpo", "--dry_run", "--loss_type", "simpo", "--cpo_alpha", "0") == 0
    assert "Dry run of cpo: 1 of" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert run("preview tpo", trains=False) == 0
    shown = capsys.readouterr().out
    assert "gold" in shown and "rejected" in shown
    (prompt,) = [line for line in shown.splitlines() if line.startswith("prompt:")]
    assert prompt.endswith("not learned")
    assert run("preview orpo", "--max_length", "14", trains=False) == 0
    (prompt,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("prompt:")]
    assert prompt.endswith("learned") and "not" not in prompt


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("cpo", ["--beta", "-1"], "beta: expected"),
        ("tpo", ["--tpo_alpha", "-1"], "tpo_alpha: expected"),
        ("orpo", ["--max_length", "1"], "max_length=1"),
    ],
)
def test_an_error_is_one_line_and_status_2(command, flags, message, run, capsys):
    assert run(command, *flags) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"trl-fast {command}:")]
    assert len(error) == 1 and message in error[0], error
