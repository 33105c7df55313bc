"""From a token batch to rewards: the backbone runs on the batch, the head on the last token of each sequence."""

from __future__ import annotations

import functools
import types

import torch
from transformers import PreTrainedModel

from trl_fast.data.packing import MIN_SHARED_TOKENS, TokenBatch
from trl_fast.data.reward_modeling import REWARD_POSITIONS, reward_batch

from .loading import backbone, unbound_forward
from .scoring import TOLERANCE, Verdict, evaluating, model_inputs
from .segment_attention import keep_score_caps, supports_packed
from .upcast_linear_layers import upcast_linear_layers

# The module that makes a reward of a hidden state, in transformers' classifiers on decoders.
HEAD = "score"


def attach_reward_scoring(model: PreTrainedModel) -> None:
    """Lets `model(..., reward_positions=(S,))` return rewards (S,); without that keyword nothing changes.

    It is the model's forward that is wrapped, so that whatever wraps the model (autocast, DDP, PEFT) stays in the way.
    Its linear layers get the fastest products that the machine has for their dtype.
    """
    if getattr(model, "trl_fast_rewards", False):
        return
    upcast_linear_layers(model)
    keep_score_caps(model)
    original = unbound_forward(model)
    model.trl_fast_rewards = True

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: object, reward_positions: torch.Tensor | None = None, **kwargs: object):
        if reward_positions is None:
            return original(self, *args, **kwargs)
        return _rewards_at(self, reward_positions, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _rewards_at(
    model: PreTrainedModel, positions: torch.Tensor, *args: object, labels: None = None, **kwargs: object
) -> torch.Tensor:
    hidden = backbone(model)(*args, **{**kwargs, "use_cache": False, "return_dict": True}).last_hidden_state
    return getattr(model, HEAD)(hidden.reshape(-1, hidden.shape[-1])[positions]).squeeze(-1)


def rewards(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """The rewards (S,) float32 of a batch's sequences.

    `model` had `attach_reward_scoring`, and may be wrapped since (PEFT, DDP, autocast); padded rows go through its own
    forward. The batch comes from `data.reward.reward_batch`.
    """
    if batch.tree_lengths is not None:
        return model(**model_inputs(batch), reward_positions=batch[REWARD_POSITIONS]).float()
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return output.logits.squeeze(-1).float()


def can_pack_rewards(model: PreTrainedModel, max_length: int | None) -> tuple[bool, str]:
    """Whether a model's architecture gives rewards of packed rows, and why not; `verify_rewards` compares numbers."""
    if not isinstance(getattr(model, HEAD, None), torch.nn.Module):
        return False, f"{type(model).__name__} has no head {HEAD!r} that reads the last token alone"
    return supports_packed(model, max_length)


def verify_rewards(model: PreTrainedModel, sequences: list[list[int]], *, layout: str | None) -> Verdict:
    """Compares our rewards of a few short sequences, in a row of `layout`, with the model's own, one by one.

    Differences are shares of the largest reward.

    Raises:
        ValueError: the model's output is not one number a sequence.
    """
    device = model.get_input_embeddings().weight.device
    # Two answers each to a prompt that is long enough to be shared.
    prompts = [(ids * MIN_SHARED_TOKENS)[:MIN_SHARED_TOKENS] for ids in sequences]
    pairs = [(prompt + ids, prompt + ids[::-1]) for prompt, ids in zip(prompts, sequences, strict=True)]
    with evaluating(model):
        rows = [torch.tensor([ids], device=device) for pair in pairs for ids in pair]
        alone = [model(input_ids=row, use_cache=False).logits for row in rows]
        if any(logits.shape != (1, 1) for logits in alone):
            raise ValueError(
                f"{type(model).__name__} returns logits of shape {tuple(alone[0].shape)} for one sequence; expected "
                "(1, 1), as AutoModelForSequenceClassification gives with num_labels=1"
            )
        error = float("inf")
        if layout is not None:
            own = torch.cat(alone).squeeze(-1).float()
            batch = reward_batch(pairs, layout, model.config.get_text_config().pad_token_id)
            difference = rewards(model, batch.to(device)) - own
            error = (difference.abs().max() / own.abs().max().clamp(min=1e-6)).item()
    return Verdict(fused_error=0.0, packed_error=error, tolerance=TOLERANCE.get(model.dtype, 2e-3))
