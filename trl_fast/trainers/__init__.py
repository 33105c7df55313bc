"""Trainers: a config and a trainer for each method of METHODS, on transformers.Trainer; imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_fast.lazy_imports import lazy_exports

from .methods import METHODS

_CALLBACKS = ("BEMACallback", "LogCompletionsCallback", "SyncRefModelCallback")
# Public names and their places.
EXPORTS = {
    **{name: place for method in METHODS.values() for name, place in method.exports.items()},
    **{name: f"trl_fast.trainers.base.callbacks:{name}" for name in _CALLBACKS},
    "RichProgressCallback": "trl_fast.trainers.base.progress:RichProgressCallback",
}

__all__ = ["METHODS", *EXPORTS]

__getattr__, __dir__ = lazy_exports(__name__, EXPORTS)

if TYPE_CHECKING:
    from .base.callbacks import BEMACallback, LogCompletionsCallback, SyncRefModelCallback
    from .base.progress import RichProgressCallback
    from .dpo import DPOTrainer
    from .dpo_config import DPOConfig
    from .grpo import GRPOTrainer
    from .grpo_config import GRPOConfig
    from .kto import KTOTrainer
    from .kto_config import KTOConfig
    from .ppo.config import PPOConfig
    from .ppo.trainer import PPOTrainer
    from .reward import RewardTrainer
    from .reward_config import RewardConfig
    from .rloo import RLOOTrainer
    from .rloo_config import RLOOConfig
    from .sft import SFTTrainer
    from .sft_config import SFTConfig
