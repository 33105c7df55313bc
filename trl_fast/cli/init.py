"""Writes a commented YAML file to begin a training run with: `trl-fast init METHOD`."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trl_fast.input_errors import error_line
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.field_docs import FieldDoc
from trl_fast.trainers.methods import METHODS

from .commands import COMMANDS
from .flag_groups import COMMAND, grouped, is_common
from .help_page import flags_of

_WIDTH = 88
# Settings that have to be named before a run, and the flag of this command that names each.
_NEEDED = {"model_name_or_path": "model", "dataset_name": "dataset"}
# The one that names the reward, by the trainer's argument for it.
_REWARD = {"reward_funcs": "reward_funcs", "reward_model": "reward_model_path"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ValueError, which is one line for the user."""
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trl-fast init",
        description="Writes a YAML file with the settings that people use most, commented and at their defaults.",
        epilog=f"METHOD is one of {', '.join(METHODS)}. Run the file by `trl-fast METHOD --config FILE`.",
        allow_abbrev=False,
    )
    parser.add_argument("method", metavar="METHOD", help="what to train with")
    parser.add_argument("--model", help="model to start from: a hub name or a folder")
    parser.add_argument("--teacher", help="teacher of a distillation: a hub name or a folder")
    parser.add_argument("--dataset", help="dataset: a hub name, a folder or a file")
    parser.add_argument("--reward", help="grpo, rloo: a reward function; ppo: a reward model")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write [METHOD.yaml]")
    parser.add_argument("--overwrite", action="store_true", help="write even if the file is there")
    return parser


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Returns what writes the file.

    Raises:
        ValueError: there is no such method or flag, or the file is there already.
    """
    given = _parser().parse_args(arguments)
    if given.method not in METHODS:
        hint = did_you_mean(given.method, METHODS) or f"; expected one of {', '.join(METHODS)}"
        raise ValueError(f"unknown method {given.method!r}{hint}")
    path: Path = given.output or Path(f"{given.method}.yaml")
    if path.exists() and not given.overwrite:
        raise ValueError(f"{path} is there already; name another file by --output, or add --overwrite")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}; make it")

    needed = {name: getattr(given, flag) for name, flag in _needed(given.method).items()}
    if given.reward is not None and given.reward not in needed.values():
        raise ValueError(f"--reward {given.reward}: {given.method} takes no reward; leave it out")

    if given.teacher is not None and given.teacher not in needed.values():
        raise ValueError(f"--teacher {given.teacher}: {given.method} takes no teacher; leave it out")

    def run() -> int:
        try:
            path.write_text(settings_file(given.method, needed), encoding="utf-8")
        except OSError as error:
            print(f"trl-fast init: --output {path}: {error_line(error)}", file=sys.stderr)
            return 2
        missing = ", ".join(name for name, value in needed.items() if value is None)
        print(f"Written: {path}. {f'Name {missing} in it, then run' if missing else 'Run'}:")
        print(f"  trl-fast {given.method} --config {path}")
        return 0

    return run


def _needed(method: str) -> dict[str, str]:
    reward = METHODS[method].reward_argument
    needed = _NEEDED if reward is None else {**_NEEDED, _REWARD[reward]: "reward"}
    return {**needed, "teacher_model_name_or_path": "teacher"} if METHODS[method].takes_teacher else needed


def settings_file(method: str, needed: dict[str, str | None]) -> str:
    """Returns the text of the YAML file: the common settings of a method, each with what it is and its default.

    needed: the settings that have no default of use; None leaves one to the reader.
    """
    values: dict[str, Any] = {"output_dir": f"runs/{method}", "sft_model_path": None, **needed}
    if values.get("reward_funcs"):
        values["reward_funcs"] = [values["reward_funcs"]]
    docs = [replace(doc, default=values.get(doc.name, doc.default)) for doc in flags_of(COMMANDS[method])]
    lines = _comment(f"Settings of `trl-fast {method} --config THIS_FILE`. Flags on the command line win over it.")
    lines += _comment(f"All settings: trl-fast {method} --help all")
    for title, members in grouped(filter(is_common, docs)).items():
        if title != COMMAND:
            lines += ["", f"# ---- {title} ----"]
            lines += [line for doc in members for line in _setting(doc, needed=doc.name in needed)]
    return "\n".join([*lines, ""])


def _setting(doc: FieldDoc, *, needed: bool) -> list[str]:
    """Returns the lines of one setting; those of the launcher, and those without a value, are commented out."""
    value = ""
    if doc.default is not None:
        value = " " + yaml.safe_dump(doc.default, default_flow_style=True, width=1000).partition("\n")[0]
    line = f"{doc.name}:{value}"
    if needed and not value:
        line += "  # name it here"
    elif not value or not doc.owner:
        line = f"# {line}"
    return ["", *_comment(" ".join(doc.text.split())), line]


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
