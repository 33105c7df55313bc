"""Provides ORPOTrainer, with TRL's constructor and behaviour."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_fast.data import AnyDataset

from .base.reference_free import ReferenceFreeTrainer
from .orpo_config import ORPOConfig


class ORPOTrainer(ReferenceFreeTrainer):
    """Trains by Odds Ratio Preference Optimization (arXiv 2403.07691).

    Args: those of `ReferenceFreeTrainer`; args is an ORPOConfig.
    """

    method = "orpo"
    config_class = ORPOConfig

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Sets the loss, as the base does.

        Raises:
            ValueError: the datasets have images.
        """
        if self.images is not None:
            raise ValueError(
                "ORPO learns the tokens of prompts too, and those of images cannot be learned; train with CPOTrainer "
                "or DPOTrainer, or remove the images"
            )
        super().set_up_data(train_dataset, tokenizer, args)
