"""Shows examples as a trainer sees them, before any weight is loaded: `trl-fast preview METHOD ...`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trl_fast.console import make_console
from trl_fast.settings.choices import did_you_mean
from trl_fast.trainers.methods import METHODS, Method

from .argument_places import argument_types
from .parser import TrlParser
from .training import RunArguments, model_options, policy_name

USAGE = "trl-fast preview METHOD [PREVIEW'S FLAGS] [TRAINING'S FLAGS]"


@dataclass
class PreviewArguments:
    """Says what to look at."""

    rows: int | None = 1000
    """How many rows, from the dataset's first, to look at. None: all of them."""

    row: int = 0
    """The row to show, counted from 0; with packing, the packed row of that number."""

    shown_tokens: int | None = 160
    """Leave out the middle of parts with more tokens. None: show all."""

    html: str | None = None
    """HTML file to write the same into, with small copies of the row's images. None: no file."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("row", 0), ("shown_tokens", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected a number from {least} on")
        if self.html is not None and not Path(self.html).parent.is_dir():
            raise ValueError(f"html={self.html!r}: there is no such folder; make it, or leave html out")


def make_parser(method: Method) -> TrlParser:
    """Makes the parser of the command for a method: flags of PreviewArguments, and all of the training command's."""
    return TrlParser((PreviewArguments, *argument_types(method), RunArguments), prog="trl-fast preview")


def split_method(arguments: list[str]) -> tuple[Method, list[str]]:
    """Returns the method that is named first, and the other arguments.

    Raises:
        ValueError: none is named, or an unknown one.
    """
    named = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if named is None or named not in METHODS:
        hint = did_you_mean(named, METHODS) if named else ""
        said = "METHOD is missing" if named is None else f"unknown method {named!r}{hint}"
        raise ValueError(f"{said}; write {USAGE}, where METHOD is one of {', '.join(METHODS)}")
    return METHODS[named], arguments[1:]


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Prepares the examples, with all that may fail; returns what prints them and gives the exit status."""
    method, arguments = split_method(arguments)
    parser = make_parser(method)
    remaining = parser.remaining_strings(arguments)
    from .launch import launcher_flags, launcher_options

    unknown = launcher_flags(remaining)[1]
    if unknown:
        raise parser.unknown(unknown, launcher_options())
    shown, *parsed, _, _ = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    script_args, training_args, model_args, mixture = parsed
    from .datasets import load_train_and_test, named_data
    from .preview_examples import Examples
    from .preview_report import Report, show

    try:
        model = policy_name(training_args, model_args)
        training_args.model_init_kwargs = model_options(training_args, model_args)
        training_args.trust_remote_code = training_args.trust_remote_code or model_args.trust_remote_code
        dataset, _ = load_train_and_test(script_args, mixture, with_test=False)
        needed = None if shown.rows is None else max(shown.rows, shown.row + 1)
        with named_data(script_args, mixture):
            examples = Examples(method, training_args, model, dataset, needed)
        found = examples.of_row(shown.row)
    except (ValueError, OSError) as error:
        raise parser.located(error, arguments) from error
    report = Report(examples, shown.row, found, shown.shown_tokens)

    def run() -> int:
        console = make_console(highlight=False)
        show(console, report)
        if shown.html is not None:
            from .preview_page import write_page

            write_page(Path(shown.html), report)
            console.print(f"Written to {shown.html}.", soft_wrap=True)
        return 0

    return run
