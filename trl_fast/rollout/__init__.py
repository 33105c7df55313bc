"""Generation and rewards for online methods."""

from .engine import Rollout, RolloutEngine, SamplingSettings, check_prompts, end_token_ids
from .rewards import RewardFunctions, RewardModel
from .transformers_engine import TransformersEngine

__all__ = [
    "RewardFunctions",
    "RewardModel",
    "Rollout",
    "RolloutEngine",
    "SamplingSettings",
    "TransformersEngine",
    "check_prompts",
    "end_token_ids",
]
