"""Trainers: a config and a trainer for each method of METHODS, on transformers.Trainer; imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trl_fast.lazy_imports import lazy_exports

from .methods import METHODS as METHODS

_CALLBACKS = ("BEMACallback", "LogCompletionsCallback", "SyncRefModelCallback")
# Public names and their places.
EXPORTS = {
    **{name: place for method in METHODS.values() for name, place in method.exports.items()},
    **{name: f"trl_fast.trainers.base.callbacks:{name}" for name in _CALLBACKS},
    "WeaveCallback": "trl_fast.trainers.base.weave_callback:WeaveCallback",
    "RichProgressCallback": "trl_fast.trainers.base.progress:RichProgressCallback",
}

if TYPE_CHECKING:
    # The same names for type checkers, which cannot read the table; a test compares.
    from .a2po import A2POTrainer as A2POTrainer
    from .a2po_config import A2POConfig as A2POConfig
    from .base.callbacks import BEMACallback as BEMACallback
    from .base.callbacks import LogCompletionsCallback as LogCompletionsCallback
    from .base.callbacks import SyncRefModelCallback as SyncRefModelCallback
    from .base.progress import RichProgressCallback as RichProgressCallback
    from .base.weave_callback import WeaveCallback as WeaveCallback
    from .bco import BCOTrainer as BCOTrainer
    from .bco_config import BCOConfig as BCOConfig
    from .cpo import CPOTrainer as CPOTrainer
    from .cpo_config import CPOConfig as CPOConfig
    from .distillation.config import DistillationConfig as DistillationConfig
    from .distillation.gkd import GKDTrainer as GKDTrainer
    from .distillation.gkd_config import GKDConfig as GKDConfig
    from .distillation.gold import GOLDTrainer as GOLDTrainer
    from .distillation.gold_config import GOLDConfig as GOLDConfig
    from .distillation.iw_opd import IWOPDTrainer as IWOPDTrainer
    from .distillation.iw_opd_config import IWOPDConfig as IWOPDConfig
    from .distillation.server_distillation import ServerDistillationTrainer as ServerDistillationTrainer
    from .distillation.server_distillation_config import ServerDistillationConfig as ServerDistillationConfig
    from .distillation.trainer import DistillationTrainer as DistillationTrainer
    from .dpo import DPOTrainer as DPOTrainer
    from .dpo_config import DPOConfig as DPOConfig
    from .gmpo import GMPOTrainer as GMPOTrainer
    from .gmpo_config import GMPOConfig as GMPOConfig
    from .grpo import GRPOTrainer as GRPOTrainer
    from .grpo_config import GRPOConfig as GRPOConfig
    from .kto import KTOTrainer as KTOTrainer
    from .kto_config import KTOConfig as KTOConfig
    from .online_dpo import OnlineDPOTrainer as OnlineDPOTrainer
    from .online_dpo_config import OnlineDPOConfig as OnlineDPOConfig
    from .orpo import ORPOTrainer as ORPOTrainer
    from .orpo_config import ORPOConfig as ORPOConfig
    from .ppo.config import PPOConfig as PPOConfig
    from .ppo.trainer import PPOTrainer as PPOTrainer
    from .reward import RewardTrainer as RewardTrainer
    from .reward_config import RewardConfig as RewardConfig
    from .rloo import RLOOTrainer as RLOOTrainer
    from .rloo_config import RLOOConfig as RLOOConfig
    from .self_distillation.sdft import SDFTTrainer as SDFTTrainer
    from .self_distillation.sdft_config import SDFTConfig as SDFTConfig
    from .self_distillation.sdpo import SDPOTrainer as SDPOTrainer
    from .self_distillation.sdpo_config import SDPOConfig as SDPOConfig
    from .sft import SFTTrainer as SFTTrainer
    from .sft_config import SFTConfig as SFTConfig
    from .tpo import TPOTrainer as TPOTrainer
    from .tpo_config import TPOConfig as TPOConfig
else:
    __all__ = ["METHODS", *EXPORTS]
    __getattr__, __dir__ = lazy_exports(__name__, EXPORTS)
