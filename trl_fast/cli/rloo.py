"""`trl-fast rloo`: online reinforcement learning from the command line."""

from __future__ import annotations

from collections.abc import Callable

from trl_fast.trainers import RLOOConfig, RLOOTrainer

from .online import OnlineScriptArguments, reward_arguments
from .training import prepare_training


def prepare(arguments: list[str]) -> Callable[[], int]:
    """What runs the command; errors in its arguments are raised at once."""
    more = {"script_class": OnlineScriptArguments, "trainer_arguments": reward_arguments}
    return prepare_training("rloo", RLOOConfig, RLOOTrainer, arguments, **more)
