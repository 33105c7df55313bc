"""Simulates the steps that ours is compared with: padded rows, and what TRL 1.16 and the usual full logits take.

Written from what they do, for their memory: hyperparameters, masks and metrics are left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trl_fast.data import TokenBatch
from trl_fast.losses.reward import reward_loss
from trl_fast.modeling.classifier_head import rewards
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.reference_policy import reference_scope

from .memory_timeline import FORWARD_STAGE, HEAD_STAGE, REFERENCE_STAGE
from .memory_tracker import MemoryTracker
from .planned_methods import PlannedModels
from .training_setup import FULL_LOGITS, TrainingSetup

# TRL's tiles of logits.
TILE_ROWS, TILE_COLUMNS = 4096, 32768
_BETA = 0.1


def baseline_loss(
    setup: TrainingSetup, models: PlannedModels, batch: TokenBatch, tracker: MemoryTracker
) -> torch.Tensor:
    """Computes the loss (0-d) of a padded batch by full logits or by TRL's tiles."""
    model, reference = models.policy, models.reference
    if setup.method == "reward":
        tracker.enter(FORWARD_STAGE)
        with setup.autocast():
            found = rewards(model, batch)
        return reward_loss(found)
    logprobs = _full_logprobs if setup.system == FULL_LOGITS else _tiled_logprobs
    if setup.method == "sft":
        tracker.enter(FORWARD_STAGE)
        return -logprobs(setup, model, batch).mean()
    tracker.enter(FORWARD_STAGE)
    sums = torch.zeros(len(batch)).index_add(0, batch.branch, logprobs(setup, model, batch))
    # After the policy's pass, and so beside all that it has saved.
    tracker.enter(REFERENCE_STAGE)
    ref_sums = torch.zeros(len(batch))
    if not setup.precompute_ref_log_probs:
        with torch.no_grad(), reference_scope(model):
            scored = logprobs(setup, model if reference is None else reference, batch)
            ref_sums = ref_sums.index_add(0, batch.branch, scored)
    tracker.enter(HEAD_STAGE)
    chosen, rejected = (sums - ref_sums).view(-1, 2).unbind(dim=1)
    return -F.logsigmoid(_BETA * (chosen - rejected)).mean()


def _full_logprobs(setup: TrainingSetup, model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Computes log_softmax over the logits of every position, in their own dtype: the least that full logits take."""
    with setup.autocast():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    every = logits[:, :-1].log_softmax(-1)
    del logits
    logprobs = every.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    # The same tokens as ours: row by row, those that a loss reads.
    width = batch.input_ids.shape[1]
    row = batch.score_positions // width
    return logprobs.float()[row, batch.score_positions - row * width]


def _tiled_logprobs(setup: TrainingSetup, model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Computes TRL 1.16's fused head at the scored positions: tiles in forward, and computed again in backward."""
    inner = base_model(model)
    with setup.autocast():
        hidden = inner.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        selected = hidden.last_hidden_state.reshape(-1, hidden.last_hidden_state.shape[-1])[batch.score_positions]
        dtype = torch.bfloat16 if setup.bf16 else setup.torch_dtype
        return TiledHead.apply(selected, inner.get_output_embeddings().weight, batch.targets, dtype)


class TiledHead(torch.autograd.Function):
    """Takes the memory of the tiles of TRL's head: one buffer of logits, and float32 sums of both gradients.

    For memory on fake tensors only: the statistics of the rows are not computed, only given room.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        tile = hidden.new_empty(min(len(hidden), TILE_ROWS), TILE_COLUMNS, dtype=dtype)
        # The largest logit, sums for the outputs, the target's logit.
        statistics = hidden.new_zeros(6, len(hidden), dtype=torch.float32)
        for rows, columns in _tiles(hidden, weight):
            product = weight[columns].to(dtype).t()
            torch.mm(hidden[rows].to(dtype), product, out=tile[: product_rows(rows), : product.shape[1]])
        ctx.save_for_backward(hidden, weight, targets, statistics[0].clone())
        ctx.dtype = dtype
        return statistics[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, _, _ = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        in_float32 = {"dtype": torch.float32}
        grad_hidden = torch.zeros(hidden.shape, **in_float32) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, **in_float32) if needs_weight else None
        tile = hidden.new_empty(min(len(hidden), TILE_ROWS), TILE_COLUMNS, dtype=ctx.dtype)
        for rows, columns in _tiles(hidden, weight):
            part, product = hidden[rows].to(ctx.dtype), weight[columns].to(ctx.dtype)
            torch.mm(part, product.t(), out=tile[: product_rows(rows), : len(product)])
        return (
            grad_hidden.to(hidden.dtype) if needs_hidden else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            None,
            None,
        )


def product_rows(rows: slice) -> int:
    """Counts the rows of a slice."""
    return rows.stop - rows.start


def _tiles(hidden: torch.Tensor, weight: torch.Tensor):
    for row in range(0, len(hidden), TILE_ROWS):
        for column in range(0, len(weight), TILE_COLUMNS):
            yield (
                slice(row, min(row + TILE_ROWS, len(hidden))),
                slice(column, min(column + TILE_COLUMNS, len(weight))),
            )
