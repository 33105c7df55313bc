"""A config and a trainer for each method; glue over the layers below, on transformers.Trainer."""

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

__all__ = [
    "BEMACallback",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "LogCompletionsCallback",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "RichProgressCallback",
    "SFTConfig",
    "SFTTrainer",
    "SyncRefModelCallback",
]
