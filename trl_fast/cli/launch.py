"""Starts a command in several processes, by `accelerate launch` with its flags, on CPUs by `torchrun`."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.commands.config.config_args import BaseConfig, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from trl_fast.input_errors import error_line
from trl_fast.settings.choices import did_you_mean
from trl_fast.settings.packages import check_package

CONFIGS = Path(__file__).parent / "accelerate_configs"
# Is set in the processes that `launch` starts, which get the same command line.
_LAUNCHED = "TRL_FAST_LAUNCHED"


def is_launched() -> bool:
    """Says whether a launcher, ours or another of torch's, has started this process."""
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def launcher_options() -> dict[str, bool]:
    """Returns the options of `accelerate launch` without dashes, and whether each takes a value."""
    options = {"accelerate_config": True}
    for action in launch_command_parser()._actions:
        for option in action.option_strings:
            options[option.lstrip("-").replace("-", "_")] = action.nargs != 0
    return options


def launcher_flags(remaining: list[str]) -> tuple[list[str], list[str]]:
    """Splits the remaining strings of a command line into flags of `accelerate launch` and flags that nobody knows.

    Raises:
        ValueError: --accelerate_config is no file and none of ours.
    """
    options = launcher_options()
    config, flags, unknown = [], [], []
    words = list(remaining)
    while words:
        word = words.pop(0)
        name, equals, value = _split_flag(word)
        if not word.startswith("--") or name not in options:
            unknown.append(word)
            while words and not words[0].startswith("-"):
                words.pop(0)
        elif options[name]:
            value = value if equals or not words else words.pop(0)
            if name == "accelerate_config":
                config = config_flags(value)
            else:
                flags += [f"--{name}", value]
        else:
            # YAML gives switches as --multi_gpu True.
            is_said = bool(words) and words[0].lower() in ("true", "false")
            if not is_said or words.pop(0).lower() == "true":
                flags.append(f"--{name}")
    # Of several --num_processes the last one counts, which is the user's.
    _parsed([*config, *flags], ["script"])
    return [*config, *flags], unknown


class _Parser(argparse.ArgumentParser):
    """Parses as another parser does; a bad flag is a ValueError."""

    def error(self, message: str) -> NoReturn:
        """Raises the error."""
        raise ValueError(re.sub(r"argument (--\w+)/--\S+:", r"\1:", message))


def _parsed(flags: list[str], script: list[str]) -> argparse.Namespace:
    """Parses flags of `accelerate launch`, and what they start.

    Raises:
        ValueError: a flag has a bad value, or a package that it needs is missing.
    """
    parser = launch_command_parser()
    parser.__class__ = _Parser
    parsed = parser.parse_args([*flags, *script])
    if parsed.num_processes is not None and parsed.num_processes < 1:
        raise ValueError(
            f"--num_processes: expected an integer >= 1, got {parsed.num_processes}; leave it out for one"
        )
    return parsed


def split_script(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the flags of `accelerate launch`, and the script or `-m module` with what follows.

    Raises:
        ValueError: a flag before the script is unknown, or there is no script.
    """
    options = launcher_options()
    count = 0
    while count < len(arguments) and arguments[count].startswith("--"):
        name, equals, _ = _split_flag(arguments[count])
        count += 2 if options.get(name) and not equals else 1
    flags, unknown = launcher_flags(arguments[:count])
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]} before the script{did_you_mean(unknown[0].lstrip('-'), options)}"
        )
    if count >= len(arguments):
        raise ValueError("no script is named after the launcher flags")
    return flags, arguments[count:]


def _split_flag(word: str) -> tuple[str, str, str]:
    name, equals, value = word.partition("=")
    return name.lstrip("-").replace("-", "_"), equals, value


def config_flags(name: str) -> list[str]:
    """Returns the flags of `accelerate launch` for a file, or for a configuration that comes with trl_fast, by name.

    The configurations of trl_fast use all GPUs of this machine unless --num_processes says otherwise.
    """
    if Path(name).is_file():
        read_config(name)
        return ["--config_file", name]
    ours = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name not in ours:
        raise ValueError(f"--accelerate_config {name}: expected a file or one of {', '.join(ours)}")
    processes = 1 if name == "single_gpu" else max(1, torch.cuda.device_count())
    return ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", str(processes)]


def read_config(file: str) -> BaseConfig:
    """Reads a file of accelerate's settings.

    Raises:
        ValueError: accelerate cannot read it.
    """
    try:
        return load_config_from_file(file)
    except Exception as error:
        raise ValueError(
            f"--accelerate_config {file}: {error_line(error)}; make one by `accelerate config`"
        ) from error


def _settings_of(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the launcher's settings: those of its file, and over them those of the flags."""
    given = {name: value for name, value in vars(parsed).items() if value is not None}
    return given if parsed.config_file is None else {**vars(read_config(parsed.config_file)), **given}


def check_engine(flags: list[str]) -> None:
    """Holds the engine that the flags ask for against this machine.

    Raises:
        ImportError: they need deepspeed and it is missing.
        ValueError: they need GPUs and there are none: accelerate's engines share a model over GPUs only.
    """
    parsed = _parsed(flags, ["script"])
    settings = _settings_of(parsed)
    engine = str(settings.get("distributed_type"))
    by_deepspeed = parsed.use_deepspeed or engine.endswith("DEEPSPEED")
    if by_deepspeed:
        check_package("deepspeed", "deepspeed", parsed.config_file or "--use_deepspeed")
    if (by_deepspeed or parsed.use_fsdp or engine.endswith("FSDP")) and not torch.accelerator.is_available():
        raise ValueError(
            "FSDP and DeepSpeed share a model over GPUs, and this machine has none; leave them out: on CPUs each of "
            "--num_processes has a copy of the model"
        )


def torchrun_flags(settings: Mapping[str, Any]) -> list[str]:
    """Returns the flags of `torchrun` for processes on CPUs; settings: of `accelerate launch`, by name."""
    machines = settings.get("num_machines") or 1
    flags = ["--nproc_per_node", str(settings["num_processes"] // machines)]
    if machines == 1:
        return ["--standalone", *flags]
    places = {"nnodes": "num_machines", "node_rank": "machine_rank"}
    places |= {"master_addr": "main_process_ip", "master_port": "main_process_port"}
    given = {flag: settings[name] for flag, name in places.items() if settings.get(name) is not None}
    return [*flags, *(word for flag, value in given.items() for word in (f"--{flag}", str(value)))]


def threads_per_process(settings: Mapping[str, Any]) -> int:
    """Returns the threads of each process on CPUs: as asked for, else its share of the cores; torchrun gives one.

    settings: of `accelerate launch`, by name.
    """
    processes = settings["num_processes"] // (settings.get("num_machines") or 1)
    return settings.get("num_cpu_threads_per_process") or max(1, (os.cpu_count() or 1) // processes)


def _start(parsed: argparse.Namespace, arguments: list[str]) -> None:
    """Starts the processes and waits for them; several on CPUs by torchrun, for accelerate would start only one."""
    settings = _settings_of(parsed)
    if torch.accelerator.is_available() or (settings.get("num_processes") or 1) == 1:
        launch_command(parsed)
        return
    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ["ACCELERATE_MIXED_PRECISION"] = str(settings.get("mixed_precision") or "no")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(settings)))
    torchrun([*torchrun_flags(settings), "--module", f"{__package__}.main", *arguments])


def launch(flags: list[str], arguments: list[str]) -> int:
    """Runs `trl-fast ARGUMENTS` in the processes that `accelerate launch FLAGS` starts; returns their exit status."""
    parsed = _parsed(flags, ["--module", f"{__package__}.main", *arguments])
    os.environ[_LAUNCHED] = "1"
    try:
        _start(parsed, arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        # The process has printed what went wrong.
        return error.get_first_failure()[1].exitcode
    finally:
        del os.environ[_LAUNCHED]
    return 0
