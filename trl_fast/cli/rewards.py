"""Finds the rewards that the commands of the online methods name: functions and models."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from trl_fast import rewards
from trl_fast.input_errors import error_line
from trl_fast.settings.choices import did_you_mean

from .arguments import ScriptArguments

# The functions that have a name of their own: TRL's names, with TRL's settings.
REWARD_FUNCTIONS: dict[str, Callable[[], Callable[..., list]]] = {
    "accuracy_reward": lambda: rewards.accuracy_reward,
    "reasoning_accuracy_reward": lambda: rewards.reasoning_accuracy_reward,
    "think_format_reward": lambda: rewards.think_format_reward,
    "get_soft_overlong_punishment": lambda: rewards.get_soft_overlong_punishment(1280, 256),
}


@dataclass
class RewardScriptArguments(ScriptArguments):
    """Names the dataset a script works on, and what rewards its completions."""

    reward_model_name_or_path: str | None = None
    """Reward model: hub name or folder of a classifier with one label. None: functions alone."""

    reward_funcs: list[str] | None = None
    """Reward functions, by name or as module.function. None: the reward model alone.

    Names: accuracy_reward, reasoning_accuracy_reward, think_format_reward, get_soft_overlong_punishment.
    """


def reward_sources(arguments: RewardScriptArguments) -> list[str | Callable[..., list]]:
    """Returns what the arguments name: the reward model, as it was named, then the functions.

    Raises:
        ValueError: a function's name is unknown, cannot be imported or is no function.
    """
    model = arguments.reward_model_name_or_path
    return [*([model] if model else []), *(_reward_function(name) for name in arguments.reward_funcs or ())]


def _reward_function(name: str) -> Callable[..., list]:
    if name in REWARD_FUNCTIONS:
        return REWARD_FUNCTIONS[name]()
    module, _, function = name.rpartition(".")
    if not module or not function:
        raise ValueError(
            f"reward_funcs: there is no {name!r}{did_you_mean(name, REWARD_FUNCTIONS)}; expected one of "
            f"{', '.join(REWARD_FUNCTIONS)}, or module.function"
        )
    # A user's own module stands where the command is run.
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Whatever it is, an exit of a script without `if __name__ == "__main__"` too: the module is the user's.
        reason = f"{type(error).__name__}: {error_line(error)}"
        raise ValueError(f"reward_funcs: {name!r} cannot be imported: {reason}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ValueError(f"reward_funcs: {name!r} is {type(found).__name__} and no function; name a function")
    return found
