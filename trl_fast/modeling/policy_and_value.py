"""Joins a policy and its value model, so that one engine prepares both and one optimizer trains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .loading import base_model
from .scoring import ModelScores

# What the names of the policy's weights begin with.
POLICY_PREFIX = "policy."


class PolicyAndValue(torch.nn.Module):
    """Holds a policy and its value model; a call runs one of them or both.

    DDP, FSDP and DeepSpeed know a model by the calls of what they have wrapped, so each call of either model is one of
    this module.

    Args:
        policy: a causal language model, with `modeling.scoring.attach_scoring`.
        value_model: a classifier with one label, with `modeling.classifier_head.attach_classifier_head`.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, value_model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.policy, self.value_model = policy, value_model
        # DeepSpeed's sizes that are "auto" are made from it.
        self.config = policy.config
        # FSDP shards these by themselves.
        classes = (base_model(model)._no_split_modules or () for model in (policy, value_model))
        self._no_split_modules = sorted({name for names in classes for name in names})

    def forward(
        self, policy: Mapping[str, Any] | None = None, value: Mapping[str, Any] | None = None
    ) -> tuple[ModelScores | None, torch.Tensor | None]:
        """Returns what the policy and the value model return for their keywords; None for a model that has none."""
        scores = None if policy is None else self.policy(**policy)
        return scores, None if value is None else self.value_model(**value)


def policy_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the policy's part of a state dict of `PolicyAndValue`, under the policy's own names."""
    return {name.removeprefix(POLICY_PREFIX): value for name, value in state.items() if name.startswith(POLICY_PREFIX)}
