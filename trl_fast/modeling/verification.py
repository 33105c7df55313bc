"""Compares our forward passes with the model's own, on a few short sequences before training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trl_fast.data.packing import MIN_SHARED_TOKENS, TokenBatch, pack_trees
from trl_fast.data.reward_modeling import reward_batch
from trl_fast.data.token_trees import Tree
from trl_fast.parallel.partitions import whole_in_forward
from trl_fast.settings.batch_layouts import BATCH_LAYOUTS, PADDED

from .classifier_head import rewards
from .scoring import evaluating, score

# How far scores may lie from those of the model's own forward, in nats a token: rounding, not another formula.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class Verdict:
    """Holds the largest differences that a verification found: in nats a token; infinite where a run failed.

    fused_error: between the fused head and the model's own logits; packed_error: between sequences in a row of a
    layout and the same ones alone.
    """

    fused_error: float
    packed_error: float
    tolerance: float

    @property
    def fused_ok(self) -> bool:
        """Returns whether the fused head agrees with the model's own logits."""
        return self.fused_error <= self.tolerance

    @property
    def packed_ok(self) -> bool:
        """Returns whether sequences in one row agree with the same ones alone."""
        return self.packed_error <= self.tolerance


def _device_of(model: PreTrainedModel) -> torch.device:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.device


def verify(model: PreTrainedModel, sequences: list[list[int]], *, layout: str | None) -> Verdict:
    """Compares our scores of a few short sequences with the model's own logits; in a row of `layout` too, unless None.

    TRL trusts the config to tell what a head does to its logits; a model with a transform that nobody knew is then
    silently trained on another policy. The same goes for architectures that mix the sequences of a row.
    """
    device = _device_of(model)
    trees = [Tree(ids[:1], [ids[1:]]) for ids in sequences]
    if layout is not None and BATCH_LAYOUTS[layout].shares_prompts:
        trees = [Tree((ids * MIN_SHARED_TOKENS)[:MIN_SHARED_TOKENS], [ids, ids[::-1]]) for ids in sequences]
    alone = [pack_trees([tree], PADDED, 0).to(device) for tree in trees]
    with evaluating(model), whole_in_forward(model):
        own = torch.cat([_own_logprobs(model, batch) for batch in alone])
        fused = torch.cat([score(model, batch).tokens.logprobs for batch in alone])
        fused_error = (fused - own).abs().max().item()
        packed_error = float("inf")
        if layout is not None:
            together = score(model, pack_trees(trees, layout, 0).to(device)).tokens.logprobs
            packed_error = (together - fused).abs().max().item()
    return Verdict(fused_error, packed_error, TOLERANCE.get(model.dtype, 2e-3))


def _own_logprobs(model: PreTrainedModel, batch: TokenBatch) -> torch.Tensor:
    # The rows of one tree are of one length here, so nothing is padded.
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.float().flatten(0, 1)
    return logits[batch.score_positions].log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


def verify_rewards(model: PreTrainedModel, sequences: list[list[int]], *, layout: str | None) -> Verdict:
    """Compares our rewards of a few short sequences, in a row of `layout`, with the model's own, one by one.

    Differences are shares of the largest reward.

    Raises:
        ValueError: the model's output is not one number a sequence.
    """
    device = _device_of(model)
    # Two answers each to a prompt that is long enough to be shared.
    prompts = [(ids * MIN_SHARED_TOKENS)[:MIN_SHARED_TOKENS] for ids in sequences]
    pairs = [(prompt + ids, prompt + ids[::-1]) for prompt, ids in zip(prompts, sequences, strict=True)]
    with evaluating(model), whole_in_forward(model):
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
