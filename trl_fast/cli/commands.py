"""Lists the commands of `trl-fast`: the help, and `main`, go by this table. Reading it imports no command."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from trl_fast.trainers.methods import METHODS, Method

from .argument_places import argument_places

TRAIN = "train"
LOOK = "look before you train"
AFTER = "after training"
MACHINE = "machine"
GROUPS = (TRAIN, LOOK, AFTER, MACHINE)
_NOTES = (
    "trl-fast COMMAND --help   what a command does, and its flags",
    "trl-fast --version        the version",
    "trl-fast --debug COMMAND  the traceback of an error that is one line without it",
)


@dataclass(frozen=True)
class Command:
    """Describes one command. Those that are no method of METHODS are modules `trl_fast.cli.NAME`, - being _, with a
    function `prepare`.

    Args:
        name: what stands after `trl-fast`.
        group: one of GROUPS, under which the help lists it.
        help: what it does, one short line.
        arguments: places "module:name" of the dataclasses whose fields are its flags, for its parser and its help;
            empty for a command that has a help of its own.
        needs: the flags that it does not run without, as its usage shows them.
        examples: command lines that the help shows.
        takes_method: it takes a method's name first, and the flags of training by that method after its own.
    """

    name: str
    group: str
    help: str
    arguments: tuple[str, ...] = ()
    needs: str = ""
    examples: tuple[str, ...] = ()
    takes_method: bool = False

    def places(self, method: str | None = None) -> tuple[str, ...]:
        """Returns the places of all its dataclasses; method: the name that stands behind it, if it takes one."""
        return self.arguments if method is None else (*self.arguments, *COMMANDS[method].arguments)


def _training(method: Method) -> Command:
    """Describes the command that trains by a method."""
    needs = "--model_name_or_path MODEL --dataset_name DATA --output_dir FOLDER"
    if method.reward_argument is not None:
        needs += " --reward_funcs NAME"
    if method.takes_teacher:
        needs += " --teacher_model_name_or_path MODEL"
    arguments = (*argument_places(method), "trl_fast.cli.training:RunArguments")
    return Command(method.name, TRAIN, method.help, arguments, needs)


_COMMANDS = (
    *map(_training, METHODS.values()),
    Command("init", LOOK, "write a commented YAML file to begin with"),
    Command(
        "preview",
        LOOK,
        "show tokenized examples: what is learned, what is cut",
        ("trl_fast.cli.preview:PreviewArguments",),
        "--model_name_or_path MODEL --dataset_name DATA",
        takes_method=True,
    ),
    Command(
        "validate",
        LOOK,
        "find what is wrong with preference data",
        ("trl_fast.cli.arguments:ScriptArguments", "trl_fast.cli.validate:ValidateArguments"),
        "--dataset_name DATA",
    ),
    Command(
        "plan",
        LOOK,
        "estimate the memory of a run, and the longest context that fits",
        ("trl_fast.cli.plan:PlanArguments",),
        "--model_name_or_path MODEL",
        (
            "trl-fast plan dpo --config training.yaml --gpu h100-80",
            "trl-fast plan sft --model_name_or_path llama-3.1-8b --use_peft --gpu rtx4090",
        ),
        takes_method=True,
    ),
    Command(
        "merge",
        AFTER,
        "merge an adapter into its model, and save the whole model",
        ("trl_fast.cli.merge:MergeArguments",),
        "ADAPTER",
    ),
    Command(
        "chat",
        AFTER,
        "talk to a model or an adapter",
        ("trl_fast.cli.chat:ChatArguments",),
        "MODEL_OR_ADAPTER",
    ),
    Command("env", MACHINE, "print versions, the kernels in use, and why others are not"),
    Command("bench", MACHINE, "measure the kernels on this machine"),
    Command("run", MACHINE, "run a script written for TRL, unchanged"),
    Command(
        "vllm-serve",
        MACHINE,
        "start vLLM's server as trainers with use_vllm expect it",
        ("trl_fast.cli.vllm_serve:VLLMServeArguments",),
        "--model MODEL",
    ),
)

# By name, in the order in which the help shows them.
COMMANDS: Mapping[str, Command] = {command.name: command for command in _COMMANDS}


def usage() -> str:
    """Returns the help text of `trl-fast`, at most 80 columns wide."""
    lines = ["usage: trl-fast COMMAND [ARGUMENTS]"]
    for group in GROUPS:
        listed = [command for command in COMMANDS.values() if command.group == group]
        lines += ["", f"{group}:"] if listed else []
        lines += [line for command in listed for line in _entry(command.name, command.help)]
    lines += ["", *_NOTES]
    return "\n".join(lines)


def _entry(name: str, does: str) -> list[str]:
    """Returns the lines of one entry: its name, and beside it what it does."""
    return textwrap.wrap(f"  {name:<12} {does}", width=80, subsequent_indent=" " * 15)
