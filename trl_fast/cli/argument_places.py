"""Says which dataclasses hold the flags of training by a method. Nothing is imported before it is needed."""

from __future__ import annotations

from trl_fast.lazy_imports import import_place
from trl_fast.trainers.methods import Method


def argument_places(method: Method) -> tuple[str, ...]:
    """Returns the places "module:name" of the dataclasses: data and rewards, the method's config, model, mixtures."""
    data = "trl_fast.cli.arguments:ScriptArguments"
    rewards = "trl_fast.cli.rewards:RewardScriptArguments"
    others = ("trl_fast.cli.arguments:ModelConfig", "trl_fast.cli.arguments:DatasetMixtureConfig")
    return (data if method.reward_argument is None else rewards, method.config, *others)


def argument_types(method: Method) -> tuple[type, ...]:
    """Imports these dataclasses, whose fields are the flags of the method's command."""
    return tuple(import_place(place) for place in argument_places(method))
