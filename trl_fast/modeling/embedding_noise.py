"""Scales NEFTune's noise (arXiv 2310.05914) by the length of a sequence, also where a row holds many.

The noise of an embedding is uniform within alpha / sqrt(L * d), L being a sequence's tokens and d the hidden size.
transformers takes the row's tokens for L, which is right for padded rows only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from trl_fast.data.segments import sequence_lengths

from .loading import backbone, base_model, whole_backbone
from .segment_attention import LENGTHS_KEYWORD


class SequenceNoise:
    """Adds NEFTune's noise to a model's embeddings in training mode, until it is removed.

    As in the padded layout, L is the length of the longest sequence of the micro-batch, a prompt and one completion
    of it. A row without tree lengths is one sequence.

    alpha: gives NEFTune's alpha, which may change in the meantime.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, alpha: Callable[[], float]) -> None:
        inner = base_model(model)
        self._alpha, self._longest = alpha, 0
        self._handles: list[RemovableHandle] = [
            # Of rows with images the embeddings are made above the text model.
            *(
                module.register_forward_pre_hook(self._read_lengths, with_kwargs=True)
                for module in {backbone(inner), whole_backbone(inner)}
            ),
            inner.get_input_embeddings().register_forward_hook(self._add_noise),
        ]

    def remove(self) -> None:
        """Takes the noise off the model."""
        for handle in self._handles:
            handle.remove()

    def _read_lengths(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        trees = kwargs.get(LENGTHS_KEYWORD) or ()
        self._longest = max(sequence_lengths(trees), default=0)

    def _add_noise(self, module: torch.nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings
        # Rounded as in transformers, so that one sequence gets the same noise.
        size = torch.tensor((self._longest or embeddings.size(1)) * embeddings.size(2))
        bound = (self._alpha() / torch.sqrt(size)).item()
        return embeddings + torch.zeros_like(embeddings).uniform_(-bound, bound)
