"""Looks for what is wrong with preference data, for continuous integration too: `trl-fast validate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trl_fast.console import FILE_WIDTH, make_console
from trl_fast.data import AnyDataset
from trl_fast.data.images.columns import has_images
from trl_fast.data.validation import ValidationReport, validate
from trl_fast.data.validation.report import FAIL_ON
from trl_fast.modeling.loading import load_processor, load_tokenizer
from trl_fast.settings.choices import one_of
from trl_fast.trainers.checkpoints.output_folder import check_output_dir

from .arguments import ScriptArguments
from .datasets import load_split
from .parser import TrlParser


@dataclass
class ValidateArguments:
    """Says what to check with, and what to write."""

    tokenizer: str | None = None
    """Tokenizer, or processor of images, for checks that depend on tokens: hub name or folder. None: without them."""

    max_length: int | None = None
    """Tokens of prompt + response that training will keep; needs --tokenizer. None: no limit."""

    output_dir: str | None = None
    """Folder for report.json and lengths.png. None: nothing is written."""

    fail_on: str = one_of(FAIL_ON, default="error")
    """The exit status is 1 for a finding at least as bad as this: error, warning, or never."""


def make_parser() -> TrlParser:
    """Makes the parser of this command: flags of ScriptArguments and ValidateArguments."""
    return TrlParser((ScriptArguments, ValidateArguments), prog="trl-fast validate")


def load_splits(arguments: ScriptArguments) -> dict[str, AnyDataset]:
    """Loads the splits that are named. A test split of the default name may be missing.

    Raises:
        ValueError: a split that was asked for is missing, or none was.
    """
    splits = {}
    if arguments.dataset_train_split is not None:
        splits[arguments.dataset_train_split] = load_split(arguments, arguments.dataset_train_split)
    test = arguments.dataset_test_split
    if test is not None:
        try:
            splits[test] = load_split(arguments, test)
        except ValueError as error:
            if not splits or test != ScriptArguments.dataset_test_split or "has no split" not in str(error):
                raise
            print(f"There is no split {test!r}; splits are not compared.", file=sys.stderr)
    if not splits:
        raise ValueError("dataset_train_split and dataset_test_split are both none; name at least one")
    return splits


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Checks the data; returns what prints and writes the report and gives the exit status."""
    script_args, validate_args = make_parser().parse_args_and_config(arguments)
    if validate_args.output_dir is not None:
        check_output_dir(validate_args.output_dir)
    splits, tokenizer = load_splits(script_args), None
    if validate_args.tokenizer:
        load = load_processor if any(map(has_images, splits.values())) else load_tokenizer
        tokenizer = load(validate_args.tokenizer)
    report = validate(splits, tokenizer, max_length=validate_args.max_length, progress=True)
    return lambda: show(report, validate_args)


def show(report: ValidationReport, arguments: ValidateArguments) -> int:
    """Prints the tables, writes the files that were asked for, and returns the exit status."""
    console = make_console(file_width=FILE_WIDTH)
    console.print(report.splits_table())
    images = report.images_table()
    if images is not None:
        console.print(images)
    if report.findings:
        console.print(report.findings_table())
    counts = ", ".join(f"{severity}: {count}" for severity, count in report.counts().items())
    failed = report.failed(arguments.fail_on)
    verdict = "Failed" if failed else "Passed"
    console.print(f"Findings by severity: {counts}. {verdict} (--fail_on {arguments.fail_on}).")
    console.print("`trl-fast preview METHOD` shows rows as training sees them.", style="dim")
    if arguments.output_dir is not None:
        folder = Path(arguments.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report.save_json(folder / "report.json")
        report.save_plot(folder / "lengths.png")
        console.print(f"Written to {folder}: report.json, lengths.png.", soft_wrap=True)
    return int(failed)
