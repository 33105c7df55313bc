"""Provides generation and rewards for online methods."""

from .engine import (
    EngineWrapper,
    Rollout,
    RolloutEngine,
    SamplingSettings,
    check_engine,
    check_prompts,
    end_token_ids,
    gathered_weights,
    generate,
)
from .images import RolloutImage, RolloutImages
from .reward_model import RewardModel
from .reward_source import GivenReward, RewardSource
from .rewards import NoRewards, RewardFunctions
from .tool_loop import ToolLoop, ToolRollout
from .tools import Toolbox
from .transformers_engine import TransformersEngine

__all__ = [
    "EngineWrapper",
    "GivenReward",
    "NoRewards",
    "RewardFunctions",
    "RewardModel",
    "RewardSource",
    "Rollout",
    "RolloutEngine",
    "RolloutImage",
    "RolloutImages",
    "SamplingSettings",
    "ToolLoop",
    "ToolRollout",
    "Toolbox",
    "TransformersEngine",
    "check_engine",
    "check_prompts",
    "end_token_ids",
    "gathered_weights",
    "generate",
]
