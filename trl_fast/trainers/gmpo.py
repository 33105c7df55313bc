"""Defines GMPOTrainer, with TRL's interface and behaviour: GRPO with geometric means of ratios."""

from __future__ import annotations

from .gmpo_config import GMPOConfig
from .grpo import GRPOTrainer


class GMPOTrainer(GRPOTrainer):
    """Trains by Geometric-Mean Policy Optimization (arXiv 2507.20673); arguments as in GRPOTrainer.

    As in TRL it is a GRPOTrainer, for scripts that ask; the loss is that of its config.

    Raises:
        ValueError, TypeError, NotImplementedError: as in GRPOTrainer.
    """

    method = "gmpo"
    config_class = GMPOConfig
