"""`validate` as a whole: formats, bad input, verdicts, and what is written."""

import json
import time

import pytest
from datasets import Dataset, DatasetDict

from support.training import color_pairs
from trl_fast.data import ValidationReport, validate


def test_a_clean_dataset():
    report = validate(color_pairs(20))
    assert isinstance(report, ValidationReport)
    assert {finding.severity for finding in report.findings} <= {"info", "warning"}
    assert not report.failed() and not report.failed("never")


def test_findings_come_worst_first_with_their_rows_and_decide_the_verdict():
    rows = color_pairs(8).to_list()
    rows[2]["chosen"] = rows[2]["rejected"]
    rows[5] = rows[4]
    report = validate(DatasetDict(train=Dataset.from_list(rows), test=color_pairs(10).select([8, 9])))
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    codes = {finding.kind.code: finding for finding in report.findings if finding.split == "train"}
    assert codes["identical_pair"].row_numbers == [2] and codes["identical_pair"].share == 1 / 8
    assert codes["repeated_row"].row_numbers == [5]
    assert report.failed() and report.failed("warning") and not report.failed("never")
    rows[2] = rows[3]
    report = validate(Dataset.from_list(rows))
    assert not report.failed() and report.failed("warning")
    with pytest.raises(ValueError, match="fail_on='info'; expected one of error, warning, never"):
        report.failed("info")


def test_streams_and_other_columns_and_formats():
    dataset = color_pairs(300).add_column("score", [0.5] * 300)
    expected = validate(dataset).to_dict()
    assert validate(dataset.to_iterable_dataset()).to_dict() == expected
    assert validate(dataset.with_format("arrow")).to_dict() == expected


def test_rows_that_cannot_be_read_are_findings_unless_all_are():
    rows = [*color_pairs(3).to_list(), {"prompt": "p", "chosen": None, "rejected": "x"}]
    report = validate(Dataset.from_list(rows))
    (finding,) = (finding for finding in report.findings if finding.kind.code == "malformed_row")
    assert list(finding.row_numbers) == [3] and "row 3, column 'chosen': None is of type NoneType" in finding.detail
    assert report.to_dict()["splits"]["train"]["readable_rows"] == 3
    with pytest.raises(ValueError, match="row 0, column 'chosen': 1 is of type int; expected a string"):
        validate(Dataset.from_dict({"chosen": [1, 2], "rejected": [1, 2]}))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"prompt": ["a"], "good": ["b"]}, r"train dataset has the columns \['prompt', 'good'\].*rename_column"),
        ({"chosen": [], "rejected": []}, "train dataset has no rows"),
        ({"prompt_ids": [[1]], "chosen_ids": [[1]], "rejected_ids": [[2]]}, "only token ids"),
        ({"prompt": ["a"], "completion": ["b"], "label": ["good"]}, "row 0, column 'label': 'good'; expected true"),
        ({"prompt": ["a"], "completion": [5], "label": [True]}, "row 0, column 'completion': 5 is of type int"),
        (
            {"prompt": ["a"], "completion": [[{"role": "user", "content": "x"}]], "label": [True]},
            "row 0: one of 'prompt' and 'completion' is text, the other messages",
        ),
    ],
)
def test_bad_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        validate(Dataset.from_dict(columns))


def test_bad_arguments():
    with pytest.raises(TypeError, match="dataset 'train' is a list; expected a Dataset"):
        validate([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="dataset has no splits"):
        validate({})
    with pytest.raises(ValueError, match="max_length=5: expected a positive number, and a tokenizer"):
        validate(color_pairs(2), max_length=5)


def test_json_and_picture(tmp_path):
    rows = color_pairs(8).to_list()
    rows[2]["chosen"] = "\0\ufffd"
    report = validate({"a": Dataset.from_list(rows), "b": color_pairs(4)})
    report.save_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == report.to_dict()
    assert read["splits"]["a"]["rows"] == 8 and read["splits"]["a"]["scripts"]["prompt"] == {"Latin": 1.0}
    assert read["splits"]["b"]["lengths"]["prompt"] == {
        "mean": 16.0,
        "percentiles": {"50": 16, "95": 16, "100": 16},
    }
    assert read["counts"]["error"] == sum(finding["severity"] == "error" for finding in read["findings"])
    report.save_plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", [{"completion": "x", "label": True}, {"chosen": "x", "rejected": "x"}])
def test_a_picture_of_one_row(row, tmp_path):
    validate(Dataset.from_list([{"prompt": "p", **row}])).save_plot(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 1000


def test_cost_grows_linearly():
    """8 times the rows take less than 16 times as long; comparing all rows with all would take 64 times."""

    def seconds(dataset):
        start = time.process_time()
        validate(dataset)
        return time.process_time() - start

    few, many = color_pairs(500), color_pairs(4000)
    seconds(few)
    assert seconds(many) < 16 * seconds(few)
