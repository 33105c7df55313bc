"""Provides TPOTrainer, with TRL's constructor and behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import TOKEN_COLUMNS, AnyDataset
from trl_fast.data.preference import GOLD_COLUMN
from trl_fast.parallel.failures import failing_together

from .base.reference_free import ReferenceFreeTrainer
from .base.trl_attributes import TRLAttribute, answers_to, loss_setting
from .tpo_config import TPOConfig


def _set_tpo_alpha(trainer: Any, value: float) -> None:
    if value and not trainer.args.tpo_alpha:
        raise ValueError(
            f"tpo_alpha={value}: batches are made without gold completions, for tpo_alpha=0 in the config"
        )
    trainer.loss_config = replace(trainer.loss_config, tpo_alpha=value)


@answers_to(
    {
        **{name: loss_setting(name) for name in ("label_smoothing", "loss_type", "tpo_l_gamma")},
        "tpo_alpha": TRLAttribute("loss_config.tpo_alpha", write=_set_tpo_alpha),
    }
)
class TPOTrainer(ReferenceFreeTrainer):
    """Trains by Triple Preference Optimization (arXiv 2405.16681).

    Args: those of `ReferenceFreeTrainer`, in TRL's order; args is a TPOConfig, and rows have a gold completion in
    `reference`, which is learned and is no reference policy.
    """

    method = "tpo"
    config_class = TPOConfig
    token_columns = (*TOKEN_COLUMNS, GOLD_COLUMN)

    def set_up_data(self, train_dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Sets the loss, as the base does.

        Raises:
            ValueError: the datasets have images.
        """
        if self.images is not None:
            raise ValueError(
                "TPO reads texts only, as TRL's does; train with DPOTrainer or CPOTrainer, or remove the images"
            )
        super().set_up_data(train_dataset, tokenizer, args)

    @failing_together()
    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: TPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        **others: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            **others,
        )
