"""`trl-fast validate`: tables, files and exit status."""

import json

from rich.console import Console

from support.tokenizer import build_tokenizer
from support.training import color_pairs
from trl_fast.cli.main import main


def split_folder(tmp_path, test_rows=range(16, 20)):
    color_pairs(16).to_json(str(tmp_path / "train.jsonl"))
    color_pairs(20).select(test_rows).to_json(str(tmp_path / "test.jsonl"))
    return str(tmp_path)


def test_status_0_for_clean_data(tmp_path, capsys):
    assert main(["validate", "--dataset_name", split_folder(tmp_path)]) == 0
    output = capsys.readouterr().out
    for expected in ("train", "test", "pairs, text", "median", "error: 0", "Passed (--fail_on error)"):
        assert expected in output


def test_status_1_files_and_remedies_for_a_leak(tmp_path, capsys):
    folder = split_folder(tmp_path, [16, 3])
    arguments = ["validate", "--dataset_name", folder, "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 1
    output = capsys.readouterr().out
    for expected in ("row is in another split too", "row 3 of train", "50.0%", "Remove it from one", "Failed"):
        assert expected in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["findings"][0]["finding"] == "leaked_row" and report["findings"][0]["row_numbers"] == [1]
    assert (tmp_path / "out" / "lengths.png").is_file()
    assert main([*arguments, "--fail_on", "never"]) == 0
    assert main([*arguments, "--dataset_test_split", "none"]) == 0


def test_a_finding_is_whole_in_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_fast.cli.validate.make_console", lambda **_: Console(width=80))
    main(["validate", "--dataset_name", split_folder(tmp_path, [16, 3])])
    output = capsys.readouterr().out
    assert "Remove it from one of the" in output and "…" not in output


def test_tokenizer_and_max_length(tmp_path, capsys):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    folder = split_folder(tmp_path)
    arguments = ["validate", "--dataset_name", folder, "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*arguments, "--max_length", "20"]) == 0
    output = capsys.readouterr().out
    assert "lengths in tokens" in output and "response cut at max_length" in output
    assert main([*arguments, "--max_length", "20", "--fail_on", "warning"]) == 1


def test_one_file_has_no_test_split(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    color_pairs(6).to_json(str(path))
    assert main(["validate", "--dataset_name", str(path)]) == 0
    assert "There is no split 'test'" in capsys.readouterr().err
    assert main(["validate", "--dataset_name", str(path), "--dataset_test_split", "evaluation"]) == 2
    assert "has no split 'evaluation'" in capsys.readouterr().err


def test_bad_input_is_one_message(tmp_path, capsys):
    folder = split_folder(tmp_path)
    assert main(["validate", "--dataset_name", folder, "--max_length", "20"]) == 2
    assert "max_length=20: expected a positive number, and a tokenizer" in capsys.readouterr().err
    none = ["--dataset_train_split", "none", "--dataset_test_split", "none"]
    assert main(["validate", "--dataset_name", folder, *none]) == 2
    assert "name at least one" in capsys.readouterr().err
