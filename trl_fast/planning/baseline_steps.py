"""Simulates the steps that ours is compared with: padded rows, and what TRL 1.16 and the usual full logits take.

Written from what they do, for their memory: hyperparameters, masks and metrics are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from trl_fast.data import TokenBatch
from trl_fast.losses.reward import reward_loss
from trl_fast.modeling.classifier_head import rewards
from trl_fast.modeling.loading import base_model, whole_backbone
from trl_fast.modeling.reference_policy import reference_scope

from .device_batches import pixels_on_device
from .generation import simulate_generation
from .memory_timeline import FORWARD_STAGE, HEAD_STAGE, OLD_STAGE, REFERENCE_STAGE
from .memory_tracker import MemoryTracker
from .planned_methods import PlannedModels
from .training_setup import FULL_LOGITS, TrainingSetup

# TRL's tiles of logits.
TILE_ROWS, TILE_COLUMNS = 4096, 32768
_BETA = 0.1
# From setup, model and padded batch to the log-probs (N,) float32 of the scored tokens.
LogProbs = Callable[[TrainingSetup, torch.nn.Module, TokenBatch], torch.Tensor]


def baseline_loss(setup: TrainingSetup, models: PlannedModels, inputs: Any, tracker: MemoryTracker) -> torch.Tensor:
    """Computes the loss (0-d) of a padded micro-batch by full logits or by TRL's tiles.

    inputs: what the method's function in PLANNED makes.

    Raises:
        ValueError: TRL has no such step.
    """
    model, reference = models.policy, models.reference
    if setup.method == "reward":
        if setup.images:
            raise ValueError("its reward trainer reads no images")
        tracker.enter(FORWARD_STAGE)
        with setup.autocast():
            found = rewards(model, inputs)
        return reward_loss(found)
    logprobs = _full_logprobs if setup.system == FULL_LOGITS else _tiled_logprobs
    if setup.method == "grpo":
        return _policy_loss(setup, models, inputs, tracker, logprobs)
    batch: TokenBatch = inputs
    tracker.enter(FORWARD_STAGE)
    if setup.method == "sft":
        return -logprobs(setup, model, batch).mean()
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


def _policy_loss(
    setup: TrainingSetup, models: PlannedModels, inputs: Any, tracker: MemoryTracker, logprobs: LogProbs
) -> torch.Tensor:
    """Computes the loss (0-d) of GRPO, after generation and the passes without gradient that come before it.

    The images of all that is sampled at a time stay on the device, once for each completion.
    """
    model = models.policy
    if setup.generates:
        simulate_generation(setup, model, inputs.generation, tracker.enter)
    held = pixels_on_device(inputs.generation.images)
    own = {name: held[name][: len(each)] for name, each in (inputs.update.batch.images or {}).items()}
    batch = replace(inputs.update.batch, images=own)
    inputs.update = replace(inputs.update, batch=batch)
    with torch.no_grad():
        if setup.scores_old_policy:
            tracker.enter(OLD_STAGE)
            logprobs(setup, model, batch)
        if setup.needs_reference:
            tracker.enter(REFERENCE_STAGE)
            with reference_scope(model):
                logprobs(setup, model if models.reference is None else models.reference, batch)
    tracker.enter(FORWARD_STAGE)
    new = logprobs(setup, model, batch)
    return -torch.exp(new - new.detach()).mean()


def _full_logprobs(setup: TrainingSetup, model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Computes log_softmax over the logits of every position, in their own dtype: the least that full logits take."""
    with setup.autocast():
        logits = model(**_inputs(batch), use_cache=False).logits
    every = logits[:, :-1].log_softmax(-1)
    del logits
    logprobs = every.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    # The same tokens as ours: row by row, those that a loss reads.
    width = batch.input_ids.shape[1]
    row = batch.score_positions // width
    return logprobs.float()[row, batch.score_positions - row * width]


def _tiled_logprobs(setup: TrainingSetup, model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Computes TRL 1.16's fused head: tiles in forward, and computed again in backward.

    On a GPU at the scored positions; on a CPU, where TRL has no kernels, at all.
    """
    inner = base_model(model)
    on_cpu = not has_tile_kernels(setup)
    with setup.autocast():
        hidden = whole_backbone(inner)(**_inputs(batch), use_cache=False)
        every = hidden.last_hidden_state.reshape(-1, hidden.last_hidden_state.shape[-1])
        selected = every if on_cpu else every[batch.score_positions]
        targets = batch.input_ids.reshape(-1) if on_cpu else batch.targets
        dtype = torch.bfloat16 if setup.bf16 else setup.torch_dtype
        scored = TiledHead.apply(selected, inner.get_output_embeddings().weight, targets, dtype, on_cpu)
    return scored[batch.score_positions] if on_cpu else scored


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    """Returns the keywords under which a model's forward takes a padded batch, as TRL gives them."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return {**inputs, **(batch.images or {})}


def has_tile_kernels(setup: TrainingSetup) -> bool:
    """Tells whether TRL has kernels for its tiles there (Triton's)."""
    return setup.device == "gpu"


class TiledHead(torch.autograd.Function):
    """Takes the memory of the tiles of TRL's head: one buffer of logits, and float32 sums of both gradients.

    For memory on fake tensors only: the statistics of the rows are not computed, only given room. On a CPU each tile
    has float32 temporaries of its size.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, on_cpu):
        tile = hidden.new_empty(min(len(hidden), TILE_ROWS), TILE_COLUMNS, dtype=dtype)
        # The largest logit, sums for the outputs, the target's logit.
        statistics = hidden.new_zeros(6, len(hidden), dtype=torch.float32)
        for rows, columns in _tiles(hidden, weight):
            product = weight[columns].to(dtype).t()
            part = tile[: product_rows(rows), : product.shape[1]]
            torch.mm(hidden[rows].to(dtype), product, out=part)
            if on_cpu:
                _score_tile(part, statistics[0, rows])
        ctx.save_for_backward(hidden, weight, targets, statistics[0].clone())
        ctx.dtype, ctx.on_cpu = dtype, on_cpu
        return statistics[0].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, log_z = ctx.saved_tensors
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        in_float32 = {"dtype": torch.float32}
        grad_hidden = torch.zeros(hidden.shape, **in_float32) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, **in_float32) if needs_weight else None
        tile = hidden.new_empty(min(len(hidden), TILE_ROWS), TILE_COLUMNS, dtype=ctx.dtype)
        for rows, columns in _tiles(hidden, weight):
            part, product = hidden[rows].to(ctx.dtype), weight[columns].to(ctx.dtype)
            logits = tile[: product_rows(rows), : len(product)]
            torch.mm(part, product.t(), out=logits)
            if ctx.on_cpu:
                _differentiate_tile(logits, targets[rows], log_z[rows])
                for total, left, right in (
                    (grad_hidden if grad_hidden is None else grad_hidden[rows], logits, product),
                    (grad_weight if grad_weight is None else grad_weight[columns], logits.t(), part),
                ):
                    if total is not None:
                        total.addmm_(left.float(), right.float())
        return (
            grad_hidden.to(hidden.dtype) if needs_hidden else None,
            grad_weight.to(weight.dtype) if needs_weight else None,
            None,
            None,
            None,
        )


def _score_tile(tile: torch.Tensor, largest: torch.Tensor) -> None:
    """Takes the temporaries of TRL's `_forward_tile`. tile: (R, C); largest: (R,) float32."""
    logits = tile.float()
    logits = logits * 1.0
    logits = logits * 1.0
    top = torch.maximum(largest, logits.amax(-1))
    exponentials = torch.exp(logits - top.unsqueeze(-1))
    exponentials.sum(-1)


def _differentiate_tile(tile: torch.Tensor, targets: torch.Tensor, log_z: torch.Tensor) -> None:
    """Takes the temporaries of TRL's `_backward_tile`. tile: (R, C); targets: (R,) int64; log_z: (R,) float32."""
    scaled = tile.float() * 1.0
    logits = scaled * 1.0
    log_p = logits - log_z.unsqueeze(-1)
    p = torch.exp(log_p)
    grad = torch.zeros_like(logits)
    is_target = torch.arange(tile.shape[1], device=tile.device) == targets.unsqueeze(-1)
    grad += log_z.unsqueeze(-1) * (is_target.float() - p)
    grad = grad * 1.0
    tile.copy_(grad * 1.0)


def product_rows(rows: slice) -> int:
    """Counts the rows of a slice."""
    return rows.stop - rows.start


def _tiles(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    for row in range(0, len(hidden), TILE_ROWS):
        for column in range(0, len(weight), TILE_COLUMNS):
            yield (
                slice(row, min(row + TILE_ROWS, len(hidden))),
                slice(column, min(column + TILE_COLUMNS, len(weight))),
            )
