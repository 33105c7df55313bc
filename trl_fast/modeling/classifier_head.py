"""Reads a classifier's head at chosen tokens of a batch: rewards of sequences, values of states.

The backbone runs on the batch in any layout, the head on the hidden states of the chosen tokens alone.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_fast.data.packing import TokenBatch
from trl_fast.data.reward_modeling import REWARD_POSITIONS

from .blank_images import needs_blank_image, reading_images
from .loading import backbone, whole_backbone
from .model_changes import changes_of, unbound_forward
from .scoring import model_inputs
from .segment_attention import keep_score_caps
from .upcast_linear_layers import upcast_linear_layers

# The module that makes a reward of a hidden state, in transformers' classifiers on decoders.
HEAD = "score"
CLASSIFIER_HEAD = "classifier head"


def attach_classifier_head(model: PreTrainedModel) -> None:
    """Lets `model(..., reward_positions=(S,))` return rewards (S,); without that keyword nothing changes.

    It is the model's forward that is wrapped, so that whatever wraps the model (autocast, DDP, PEFT) stays in the way.
    Its linear layers get the fastest products that the machine has for their dtype.
    """
    changes = changes_of(model)
    if CLASSIFIER_HEAD in changes:
        return
    upcast_linear_layers(model)
    keep_score_caps(model)
    original = unbound_forward(model)

    @functools.wraps(type(model).forward)
    def forward(
        self: Any, *args: Any, reward_positions: torch.Tensor | None = None, with_images: bool = False, **kwargs: Any
    ) -> Any:
        blank = needs_blank_image(self, kwargs)
        with reading_images(self, blank=blank):
            if reward_positions is None:
                return original(self, *args, **kwargs)
            inner = whole_backbone(self) if with_images or blank else backbone(self)
            return _rewards_at(self, inner, reward_positions, *args, **kwargs)

    change = changes.get_or_add(CLASSIFIER_HEAD, "model(..., reward_positions=...) returns the head's numbers there")
    change.set(model, "forward", types.MethodType(forward, model))


def has_classifier_head(model: object) -> bool:
    """Returns whether a model has a head that reads a single token, as classifiers on decoders have."""
    return isinstance(getattr(model, HEAD, None), torch.nn.Module)


def _rewards_at(
    model: PreTrainedModel,
    inner: PreTrainedModel,
    positions: torch.Tensor,
    *args: object,
    labels: None = None,
    **kwargs: object,
) -> torch.Tensor:
    hidden = inner(*args, **{**kwargs, "use_cache": False, "return_dict": True}).last_hidden_state
    return getattr(model, HEAD)(hidden.reshape(-1, hidden.shape[-1])[positions]).squeeze(-1)


def rewards(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Computes the rewards (S,) float32 of a batch's sequences.

    `model` had `attach_classifier_head`, and may be wrapped since (PEFT, DDP, autocast); padded rows without images go
    through its own forward. The batch comes from `data.reward_modeling.reward_batch`.
    """
    if batch.tree_lengths is not None or batch.images is not None:
        return read_head(model, batch)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits.squeeze(-1).float()


def read_head(model: Callable[..., torch.Tensor], batch: TokenBatch) -> torch.Tensor:
    """Computes the head's numbers (M,) float32 at the tokens that `state_batch` or `end_batch` marked.

    `model` had `attach_classifier_head`, and may be wrapped since (DDP, autocast, PEFT).
    """
    return model(**head_inputs(batch)).float()


def head_inputs(batch: TokenBatch) -> dict[str, object]:
    """Returns the keywords with which a model reads its head at the tokens that a batch marks."""
    inputs = {**model_inputs(batch), "reward_positions": batch[REWARD_POSITIONS]}
    return inputs if batch.images is None else {**inputs, "with_images": True}


def state_batch(batch: TokenBatch, has_end: torch.Tensor) -> TokenBatch:
    """Marks a batch to be read at all M states of its S completions (`losses.ppo.States`).

    has_end: (S,) bool, on the CPU. The state before a token is read where that token is predicted, the one after a
    completion at its last token.
    """
    lengths = batch.branch_lengths.tolist()
    positions = [places[-length - 1 :] for places, length in zip(_positions(batch), lengths, strict=True)]
    kept = [places if end else places[:-1] for places, end in zip(positions, has_end.tolist(), strict=True)]
    return _read_at(batch, torch.cat(kept))


def end_batch(batch: TokenBatch, pad_token_id: int) -> TokenBatch:
    """Marks a batch to be read at the last token of each of its S sequences that is not the pad token.

    There transformers reads classifiers, and reward models are trained: where EOS is the pad token, not at EOS.
    """
    ids = batch.input_ids.flatten()
    ends = []
    for places in _positions(batch):
        seen = places[ids[places] != pad_token_id]
        ends.append((seen if len(seen) else places)[-1])
    return _read_at(batch, torch.stack(ends))


def _positions(batch: TokenBatch) -> list[torch.Tensor]:
    """Returns flat positions (length,) of each sequence's tokens, its prompt included."""
    return batch.by_sequence(torch.arange(batch.input_ids.numel()).view_as(batch.input_ids))


def _read_at(batch: TokenBatch, positions: torch.Tensor) -> TokenBatch:
    return replace(batch, extras={**batch.extras, REWARD_POSITIONS: positions})
