"""Asks reward models about the policy's tokens, so that nothing is decoded and encoded again."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from trl_fast.modeling.classifier_head import attach_classifier_head, end_batch, read_head
from trl_fast.modeling.layouts import LayoutRequest, choose_layout_or_pad
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.scoring import evaluating

from .samples import Samples


class TokenRewardModel:
    """Asks a classifier at each completion's last token: a reward source.

    Args:
        model: a sequence classifier with one label, on its device; it gets our scoring forward.
        layout: the arguments' batch_layout.
        pad_token_id: for padded rows.
        sequences: a few, to try the layout out on.
        batch_size: completions at a time.
    """

    def __init__(
        self, model: PreTrainedModel, layout: str, pad_token_id: int, sequences: list[list[int]], batch_size: int
    ) -> None:
        inner = base_model(model)
        self.__name__ = inner.config._name_or_path.rstrip("/").split("/")[-1] or type(inner).__name__
        inner.config.get_text_config().pad_token_id = pad_token_id
        attach_classifier_head(inner)
        self.model, self.pad_token_id, self.batch_size = model, pad_token_id, batch_size
        self.layout = choose_layout_or_pad(inner, LayoutRequest(layout), sequences)

    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        """Returns a reward for each completion."""
        samples = Samples.of(prompt_ids, completion_ids)
        rewards = torch.zeros(len(samples))
        order = samples.grouped(range(len(samples)))
        with evaluating(self.model):
            for start in range(0, len(order), self.batch_size):
                chunk = order[start : start + self.batch_size]
                batch = samples.select(chunk).batch(self.layout, self.pad_token_id)
                batch = end_batch(batch, self.pad_token_id)
                rewards[chunk] = read_head(self.model, batch.to(self.model.device)).cpu()
        return rewards.tolist()
