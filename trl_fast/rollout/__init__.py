"""Generation and rewards for online methods."""

from .engine import Rollout, RolloutEngine, SamplingSettings, check_prompts, end_token_ids
from .transformers_engine import TransformersEngine

__all__ = [
    "Rollout",
    "RolloutEngine",
    "SamplingSettings",
    "TransformersEngine",
    "check_prompts",
    "end_token_ids",
]
