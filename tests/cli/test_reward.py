"""`trl-fast reward`, as a person runs it."""

import shlex

from transformers import AutoModelForSequenceClassification

from trl_fast.cli.main import main

SETTINGS = shlex.split(
    "--per_device_train_batch_size 4 --max_steps 2 --logging_steps 1 --use_cpu true --bf16 false --report_to none "
    "--dataloader_pin_memory false --learning_rate 1e-3"
)


def reward(model_path, pairs_file, output_dir, *flags):
    paths = ["--model_name_or_path", model_path, "--dataset_name", str(pairs_file), "--output_dir", str(output_dir)]
    return main(["reward", *paths, *SETTINGS, *flags])


def test_it_trains_evaluates_and_saves(model_path, pairs_file, tmp_path, capsys):
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "2", "--dataset_test_split", "train[:25%]"]
    centred = ["--center_rewards_coefficient", "0.01"]
    assert reward(model_path, pairs_file, tmp_path / "run", *evaluation, *centred) == 0
    output = capsys.readouterr().out
    for expected in ("min_reward", "accuracy", "eval_loss", f"saved to {tmp_path / 'run'}"):
        assert expected in output
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config.num_labels == 1


def test_an_adapter_brings_the_head_without_being_told_to(model_path, pairs_file, tmp_path, caplog):
    assert reward(model_path, pairs_file, tmp_path / "run", "--use_peft", "--lora_r", "4") == 0
    assert "'SEQ_CLS' is used" in caplog.text
    text = (tmp_path / "run" / "adapter_config.json").read_text()
    assert '"SEQ_CLS"' in text and '"score"' in text


def test_an_error_is_one_line_and_status_1(model_path, pairs_file, tmp_path, capsys):
    assert reward(model_path, pairs_file, tmp_path / "run", "--max_length", "3") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-fast reward:")]
    assert len(error) == 1 and "max_length=3" in error[0]
