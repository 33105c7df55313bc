"""Answers `trl.scripts.METHOD`: the parser and the main function of each training command."""

from __future__ import annotations

import argparse
import functools
import importlib
import subprocess
from pathlib import Path
from typing import Any

from trl_fast.cli.argument_places import argument_types
from trl_fast.cli.parser import TrlParser
from trl_fast.cli.rewards import REWARD_FUNCTIONS
from trl_fast.cli.training import checkpoint_to_resume, make_trainer, train
from trl_fast.cli.vllm_serve import VLLMServeArguments
from trl_fast.trainers.methods import METHODS


def make_parser(name: str, subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """Makes the parser of a method's command, as one of several sub-commands if there are `subparsers`."""
    method = METHODS[name]
    if subparsers is None:
        return TrlParser(argument_types(method), prog=prog)
    return subparsers.add_parser(method.name, help=method.help, dataclass_types=argument_types(method))


def main(name: str, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Trains and saves the model that the arguments of a method's command describe.

    Raises:
        ValueError: no model, no dataset or no reward was named, or the data is bad.
    """
    trainer: Any = make_trainer(METHODS[name], script_args, training_args, model_args, dataset_args)
    status = train(trainer, checkpoint_to_resume(trainer), dataset_name=script_args.dataset_name)
    if status:
        raise SystemExit(status)


def make_serve_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None) -> Any:
    """Makes the parser of `vllm-serve`, as one of several sub-commands if there are `subparsers`."""
    if subparsers is None:
        return TrlParser(VLLMServeArguments, prog=prog)
    return subparsers.add_parser("vllm-serve", dataclass_types=VLLMServeArguments)


def get_git_commit_hash(package_name: str) -> str | None:
    """Returns the commit of the repository that a package stands in; None where it is installed without one."""
    folder = Path(str(importlib.import_module(package_name).__file__)).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def __getattr__(attribute: str) -> Any:
    if attribute == "reward_funcs_registry":
        return {name: make() for name, make in REWARD_FUNCTIONS.items()}
    # sft_main, sft_make_parser, ... for each method.
    name, _, function = attribute.partition("_")
    if name in METHODS and function in ("main", "make_parser"):
        return functools.partial(globals()[function], name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
