"""The file that `trl-fast init` writes is read by the training command, and says what the defaults are."""

import dataclasses

import pytest
import yaml

from trl_fast.cli.init import settings_file
from trl_fast.cli.main import main
from trl_fast.cli.training import make_parser
from trl_fast.trainers.methods import METHODS

# The reward's setting, and its value, for the methods that need one.
REWARDS = {
    "reward_funcs": ("reward_funcs", ["think_format_reward"]),
    "reward_model": ("reward_model_path", "think_format_reward"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_file_has_the_defaults(method, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reward = ["--reward", "think_format_reward"] if method.reward_argument else []
    teacher = ["--teacher", "t"] if method.takes_teacher else []
    assert main(["init", method.name, "--model", "m", "--dataset", "d.jsonl", *reward, *teacher]) == 0
    file = f"{method.name}.yaml"
    assert capsys.readouterr().out == f"Written: {file}. Run:\n  trl-fast {method.name} --config {file}\n"
    same = ["--use_cpu", "true", "--bf16", "false"]
    *read, unknown = make_parser(method).parse_args_and_config(
        ["--config", file, *same], return_remaining_strings=True
    )
    assert not unknown
    flags = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--output_dir", f"runs/{method.name}", *same]
    flags += ["--teacher_model_name_or_path", "t"] if method.takes_teacher else []
    expected = make_parser(method).parse_args_and_config(flags)
    changed = {"sft_model_path"}
    if method.reward_argument:
        name, value = REWARDS[method.reward_argument]
        changed.add(name)
        assert value in [getattr(part, name, None) for part in read]
    for ours, theirs in zip(read, expected, strict=True):
        for item in dataclasses.fields(theirs):
            if item.name not in changed:
                assert getattr(ours, item.name) == getattr(theirs, item.name), item.name


@pytest.mark.parametrize("method", METHODS)
def test_what_has_to_be_named_is_said(method, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    assert main(["init", method, "--output", str(path)]) == 0
    needed = [line.partition(":")[0] for line in path.read_text().splitlines() if line.endswith("# name it here")]
    said = capsys.readouterr().out.partition("Name ")[2].partition(" in it")[0]
    assert sorted(said.split(", ")) == sorted(needed) and {"model_name_or_path", "dataset_name"} <= {*needed}
    assert max(map(len, path.read_text().splitlines())) <= 88
    values = yaml.safe_load(path.read_text())
    assert len(values) >= 20 and "num_processes" not in values


def test_a_file_is_not_overwritten_silently(tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text("mine")
    assert main(["init", "sft", "--output", str(path)]) == 2
    assert "x.yaml is there already; name another file by --output, or add --overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", "sft", "--output", str(path), "--overwrite"]) == 0
    assert path.read_text() == settings_file("sft", {"model_name_or_path": None, "dataset_name": None})


@pytest.mark.parametrize(
    "words, message",
    [
        (["dop"], "unknown method 'dop'; did you mean 'dpo'?"),
        ([], "METHOD"),
        (["sft", "--modle", "m"], "unrecognized arguments: --modle m"),
        (["sft", "--output", "nowhere/x.yaml"], "there is no folder nowhere; make it"),
        (["sft", "--output", "/proc/x.yaml"], "--output /proc/x.yaml: "),
        (["sft", "--reward", "accuracy_reward"], "sft takes no reward; leave it out"),
        (["sft", "--teacher", "t"], "--teacher t: sft takes no teacher; leave it out"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trl-fast init: ") and message in line
    assert not list(tmp_path.iterdir())
