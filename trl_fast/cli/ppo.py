"""`trl-fast ppo`: online reinforcement learning with a reward model and a value model, from the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_fast.trainers import PPOConfig, PPOTrainer

from .online import OnlineScriptArguments, reward_arguments
from .training import prepare_training


def _reward_model(arguments: OnlineScriptArguments) -> dict[str, Any]:
    """The trainer's `reward_model` where flags other than --reward_model_path name it."""
    if not (arguments.reward_funcs or arguments.reward_model_name_or_path):
        return {}
    sources = reward_arguments(arguments)["reward_funcs"]
    return {"reward_model": sources[0] if len(sources) == 1 else sources}


def _make_trainer(*, model: str, args: PPOConfig, **arguments: Any) -> PPOTrainer:
    """The trainer: --sft_model_path is the policy to start from, or where that is not given --model_name_or_path."""
    policy = model if args.sft_model_path == PPOConfig.sft_model_path else args.sft_model_path
    return PPOTrainer(args=args, model=policy, **{"reward_model": args.reward_model_path, **arguments})


def prepare(arguments: list[str]) -> Callable[[], int]:
    """What runs the command; errors in its arguments are raised at once."""
    more = {"script_class": OnlineScriptArguments, "trainer_arguments": _reward_model}
    return prepare_training("ppo", PPOConfig, _make_trainer, arguments, **more)
