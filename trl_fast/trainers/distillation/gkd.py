"""Defines GKDTrainer, with TRL's interface: distillation on given completions and the student's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_fast.data import AnyDataset
from trl_fast.rollout import RolloutEngine

from ..base.trl_attributes import answers_to
from .gkd_config import GKDConfig
from .trainer import DistillationTrainer
from .trl_attributes import GKD_ATTRIBUTES

logger = logging.getLogger(__name__)

# Arguments of TRL's trainer that change nothing there either, or not here.
_UNUSED = {
    "data_collator": "rows become batches without padding",
    "formatting_func": "rows are messages, or prompts with completions",
}
_REFUSED = {
    "compute_metrics": "no logits are kept to compute metrics from; read eval_loss and eval_entropy, or leave it out",
    "preprocess_logits_for_metrics": "no logits are kept to compute metrics from; leave it out",
}


def check_unused_arguments(model: object, **given: object) -> None:
    """Checks the model that a trainer is given, and says which of its other arguments are not used.

    Raises:
        ValueError: the model is missing, or an argument is refused.
    """
    for name in (name for name, value in given.items() if value is not None):
        if name in _REFUSED:
            raise ValueError(f"{name}: {_REFUSED[name]}")
        logger.warning(f"{name} is not used: {_UNUSED[name]}.")
    if model is None:
        raise ValueError("model is missing; give the student's name, or a causal language model")


@answers_to(GKD_ATTRIBUTES)
class GKDTrainer(DistillationTrainer):
    """Trains by Generalized Knowledge Distillation (arXiv 2306.13649), with TRL's arguments.

    Args:
        model, teacher_model, args, processing_class, callbacks, optimizers: as in DistillationTrainer.
        peft_config, quantization_config, rollout_engine, tokenizer: as there, too.
        train_dataset, eval_dataset: rows with `messages`, of which the last one is the answer, or with `prompt` and
            `completion`.
        data_collator, formatting_func: not used.
        compute_metrics, preprocess_logits_for_metrics: refused.

    Raises:
        ValueError, TypeError, NotImplementedError: as in DistillationTrainer.
    """

    method = "gkd"
    config_class = GKDConfig
    length_setting = "max_new_tokens"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        teacher_model: str | PreTrainedModel | PeftModel | None = None,
        args: GKDConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable | None = None,
        *,
        quantization_config: object | None = None,
        rollout_engine: RolloutEngine | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        check_unused_arguments(
            model,
            data_collator=data_collator,
            formatting_func=formatting_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        assert model is not None, "it is looked at before"
        super().__init__(
            *(model, teacher_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers),
            quantization_config=quantization_config,
            peft_config=peft_config,
            rollout_engine=rollout_engine,
            tokenizer=tokenizer,
        )
