"""Provides CPOTrainer, with TRL's constructor and behaviour."""

from __future__ import annotations

from .base.reference_free import ReferenceFreeTrainer
from .base.trl_attributes import answers_to, loss_setting
from .cpo_config import CPOConfig

_SETTINGS = ("label_smoothing", "loss_type", "cpo_alpha", "simpo_gamma", "alpha")


@answers_to({name: loss_setting(name) for name in _SETTINGS})
class CPOTrainer(ReferenceFreeTrainer):
    """Trains by Contrastive Preference Optimization (arXiv 2401.08417), SimPO (arXiv 2405.14734) and their relatives.

    Args: those of `ReferenceFreeTrainer`; args is a CPOConfig.
    """

    method = "cpo"
    config_class = CPOConfig
