"""Values of states and rewards of completions: a classifier's head, read at any token of a batch, in any layout."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_fast.data.packing import TokenBatch
from trl_fast.data.reward_modeling import REWARD_POSITIONS

from .loading import backbone, is_quantized
from .reward_scoring import HEAD, can_pack_rewards, verify_rewards
from .scoring import model_inputs
from .segment_attention import supports_sharing, use_segment_attention

logger = logging.getLogger(__name__)


def check_classifier(model: object, argument: str, vocab_size: int) -> None:
    """Makes sure that a model reads one number at any token of the policy's.

    argument: the trainer's name for it. vocab_size: the policy's tokens.

    Raises:
        TypeError: it is no model of transformers.
        ValueError: it has another head or number of labels, or lacks tokens.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"{argument}: expected a model of transformers, got {type(model).__name__}")
    name = type(model).__name__
    if not isinstance(getattr(model, HEAD, None), torch.nn.Module):
        raise ValueError(
            f"{argument}: {name} has no head {HEAD!r} that reads a single token, as those of "
            "AutoModelForSequenceClassification for decoders have"
        )
    if model.config.num_labels != 1:
        raise ValueError(f"{argument}: {name} has num_labels={model.config.num_labels}; expected 1")
    known = model.get_input_embeddings().weight.shape[0]
    if known < vocab_size:
        raise ValueError(
            f"{argument}: {name} has {known} tokens, but it is given those of the policy's tokenizer, which has "
            f"{vocab_size}; use models with one tokenizer"
        )


def make_value_model(policy: PreTrainedModel, reward_model: PreTrainedModel | None) -> PreTrainedModel:
    """A new value model, in the policy's dtype: a copy of the reward model, as in arXiv 2203.02155; without one the
    policy's layers, with a new, random head.

    Raises:
        ValueError: the policy is quantised, or transformers has no classifier of its kind.
    """
    if reward_model is not None:
        return copy.deepcopy(reward_model).to(policy.dtype).requires_grad_(True)
    if is_quantized(policy):
        raise ValueError("value_model=None cannot copy quantised weights; give a value_model")
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ValueError(
            f"value_model=None: transformers has no classifier for {type(policy).__name__}; give a value_model"
        ) from error
    backbone(model).load_state_dict(backbone(policy).state_dict())
    return model.to(policy.device)


def choose_classifier_layout(
    model: PreTrainedModel, asked: str, sequences: list[list[int]], *, without_dropout: bool
) -> str:
    """The best batch layout that a classifier runs, tried out on short sequences; "padded" always does.

    asked: the arguments' batch_layout. without_dropout: whether dropout is switched off.
    """
    before = model.config.get_text_config()._attn_implementation
    for layout in ("shared_prefix", "packed"):
        possible = asked in ("auto", layout) and can_pack_rewards(model, None)[0]
        if not possible or (
            layout == "shared_prefix" and not supports_sharing(model, without_dropout=without_dropout)[0]
        ):
            continue
        use_segment_attention(model)
        if verify_rewards(model, sequences, layout=layout).packed_ok:
            return layout
        model.set_attn_implementation(before or "sdpa")
    if asked != "padded":
        logger.warning(f"batch_layout: {type(model).__name__} is run on padded rows, since it cannot run packed ones.")
    return "padded"


def state_batch(batch: TokenBatch, has_end: torch.Tensor) -> TokenBatch:
    """The batch, to be read at all M states of its S completions (`losses.ppo.States`).

    has_end: (S,) bool, on the CPU. The state before a token is read where that token is predicted, the one after a
    completion at its last token.
    """
    lengths = batch.branch_lengths.tolist()
    places = [place[-length - 1 :] for place, length in zip(_places(batch), lengths, strict=True)]
    kept = [place if end else place[:-1] for place, end in zip(places, has_end.tolist(), strict=True)]
    return _read_at(batch, torch.cat(kept))


def end_batch(batch: TokenBatch, pad_token_id: int) -> TokenBatch:
    """The batch, to be read at the last token of each of its S sequences that is not the pad token.

    There transformers reads classifiers, and reward models are trained: where EOS is the pad token, not at EOS.
    """
    ids = batch.input_ids.flatten()
    places = []
    for place in _places(batch):
        seen = place[ids[place] != pad_token_id]
        places.append((seen if len(seen) else place)[-1])
    return _read_at(batch, torch.stack(places))


def read_head(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """What the head says, (M,) float32, at the places that `state_batch` or `end_batch` marked.

    `model` had `reward_scoring.attach_reward_scoring`, and may be wrapped since (DDP, autocast, PEFT).
    """
    return model(**model_inputs(batch), reward_positions=batch[REWARD_POSITIONS]).float()


def _places(batch: TokenBatch) -> list[torch.Tensor]:
    """Flat positions of each sequence's tokens, its prompt included."""
    return batch.by_sequence(torch.arange(batch.input_ids.numel()).view_as(batch.input_ids))


def _read_at(batch: TokenBatch, positions: torch.Tensor) -> TokenBatch:
    return replace(batch, extras={**batch.extras, REWARD_POSITIONS: positions})
