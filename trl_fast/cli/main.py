"""The entry point of `trl-fast`."""

from __future__ import annotations

import importlib
import sys

from trl_fast.console import make_console

COMMANDS = {
    "sft": "train with supervised fine-tuning",
    "dpo": "train with Direct Preference Optimization and its relatives",
    "reward": "train a reward model",
    "kto": "train with Kahneman-Tversky Optimization, from single completions that are good or bad",
    "grpo": "train with Group Relative Policy Optimization, from rewards of sampled completions",
    "rloo": "train with REINFORCE and leave-one-out baselines, from rewards of sampled completions",
    "ppo": "train with Proximal Policy Optimization, from a reward model and with a value model",
    "run": "run a script written for TRL, unchanged",
    "bench": "run a benchmark of the source tree",
    "env": "print versions, backends with reasons, and facts about this machine",
    "plan": "simulate a training step's memory, and the longest context that fits a GPU",
    "validate": "look for what is wrong with preference data",
}


def usage() -> str:
    """The help text."""
    lines = ["usage: trl-fast COMMAND [ARGUMENTS]", "", "commands:"]
    lines += [f"  {name:9}{what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", "trl-fast COMMAND --help lists a command's arguments."])


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; its exit status: 2 and one message for bad input or wrong usage, 1 where the work failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"trl-fast: unknown command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        run = importlib.import_module(f"trl_fast.cli.{command}").prepare(rest)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        console = make_console(stderr=True)
        console.print(f"trl-fast {command}: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
