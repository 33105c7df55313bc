"""Checks a model against the arguments of self-distillation, before training starts."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trl_fast.modeling.loading import base_model
from trl_fast.parallel.partitions import whole_shape

from .arguments import TOPK_LOGITS, SelfDistillationConfig


def check_topk(model: PreTrainedModel | PeftModel, args: SelfDistillationConfig) -> None:
    """Checks that a model has as many tokens as are compared.

    Raises:
        ValueError: it has not.
    """
    head: Any = base_model(model).get_output_embeddings()
    size = whole_shape(head.weight)[0]
    if args.distillation_mode == TOPK_LOGITS and (args.distillation_topk or 0) > size:
        raise ValueError(
            f"distillation_topk={args.distillation_topk} is more than the {size} tokens of the vocabulary; set it "
            "lower, or distillation_mode='full_logits' to compare all"
        )
