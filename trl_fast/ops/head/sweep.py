"""Sweeps forward over the head: rows are scored tile by tile, as the plan says; nothing is decided here."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ..matmul import add_mm, mm_into
from ..memory_pool import pooled_empty
from .fused_kernel import SlicedWeight, score_rows_fused
from .kept_logits import PACKED_DTYPE, KeptLogits, KeptTile, num_chunks
from .row_kernels import row_lse_gradient_by_two
from .row_statistics import (
    BEFORE,
    ENTROPY,
    ENTROPY_ROW,
    IS_TOP1,
    IS_TOP1_ROW,
    LOG_SUM_SQ_PROBS,
    LOG_SUM_SQ_ROW,
    LOGPROB_ROW,
    LSE_LOW_ROW,
    LSE_ROW,
    MEAN_LOGITS,
    MEAN_LOGITS_ROW,
    NUM_STATES,
    NUM_STATISTICS,
    SUM,
    SUM_SQ,
    SUM_X,
    TARGET,
    TOP,
    TOTAL,
)
from .tiled_head import TiledHead


def score_rows_and_keep(
    head: TiledHead, hidden: torch.Tensor, targets: torch.Tensor, outputs: int
) -> tuple[torch.Tensor, KeptLogits]:
    """Computes the statistics (7, N) of all rows, and keeps the logits that the plan keeps; see score_rows."""
    logits = empty_kept_logits(head)
    return score_rows(head, hidden, targets, outputs, keep=logits), logits


def score_rows(
    head: TiledHead,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    *,
    keep: KeptLogits | None = None,
) -> torch.Tensor:
    """Computes the statistics (7, N) of all rows.

    hidden: (N, H) in the product's dtype; targets: (N,) int64; outputs: mask of what is computed; keep: takes the
    logits of the first rows, as many as it has. Collective where other processes have columns too.
    """
    if head.shard is not None:
        targets = head.shard.local(targets)
    state = new_state(hidden.shape[0], hidden.device)
    plan = head.plan
    if plan.fused is not None:
        weight = SlicedWeight(plan.weight_slices, head.cast_tile if plan.casts_weight else head.weight.__getitem__)
        given = (hidden, weight, targets, head.bias, head.transform, outputs, state, keep)
        score_rows_fused(*given, plan.fused, plan.limits.tile_bytes)
    else:
        _score_tiles(head, hidden, targets, outputs, state, keep)
    if head.shard is not None:
        state = head.shard.merged(state)
    return finish_scores(state, outputs, head.vocab_size, plan.sum_dtype)


def _score_tiles(
    head: TiledHead,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    state: torch.Tensor,
    keep: KeptLogits | None,
) -> None:
    plan = head.plan
    num_rows, kept = hidden.shape[0], 0 if keep is None else keep.values.shape[1]
    whole_block = (num_rows, kept) == (plan.block_rows, plan.kept_rows)
    tiles = plan.scoring if whole_block else plan.scoring_tiles(num_rows, kept)
    packs = keep is not None and plan.packed
    # Logits that stay raw are computed where they are kept; others pass through a tile.
    passing = num_rows if packs else num_rows - kept
    scratch = hidden.new_empty(0, 0)
    if passing:
        scratch = pooled_empty(
            (min(tiles.num_rows, passing), tiles.num_columns), plan.logits_dtype, head.weight.device
        )
    for columns in tiles.columns:
        weight = head.cast_tile(columns) if plan.casts_weight else head.weight[columns]
        bias = None if head.bias is None else head.bias[columns]
        for rows in tiles.rows:
            room = keep.tile(columns, rows) if keep is not None and rows.start < kept else None
            tile = scratch[: rows.stop - rows.start, : columns.stop - columns.start]
            if room is not None and not packs:
                tile, room = room.values, None
            mm_into(tile, hidden[rows], weight.t())
            given = (tile, targets[rows], bias)
            if room is None:
                head.kernels.scores(*given, *head.transform, outputs, columns.start, state[:, rows])
            else:
                _pack_tile(head, given, columns.start, outputs, state[:, rows], room)


def _pack_tile(
    head: TiledHead, given: tuple, column_offset: int, outputs: int, state: torch.Tensor, room: KeptTile
) -> None:
    """Adds a tile to the state (7, R) of its rows and packs its logits; given: (logits (R, C), targets, bias)."""
    scale, _, inv_temperature = head.transform
    assert head.kernels.scores_packed is not None, "the plan packs only what the kernels pack"
    head.kernels.scores_packed(*given, scale, inv_temperature, outputs, column_offset, state, *room)


def empty_kept_logits(head: TiledHead) -> KeptLogits:
    """Returns room for the logits that the plan keeps."""
    plan, device = head.plan, head.weight.device
    if not plan.packed:
        return KeptLogits(pooled_empty(plan.kept_shape, plan.logits_dtype, device), None, plan.kept_columns)
    num_tiles, num_rows, _ = plan.kept_shape
    words = pooled_empty(plan.kept_shape, PACKED_DTYPE, device)
    tops = pooled_empty((num_tiles, num_rows, num_chunks(plan.kept_columns, plan.chunk)), torch.float32, device)
    return KeptLogits(words, tops, plan.kept_columns, plan.chunk)


def score_rows_with_unit_gradient(
    head: TiledHead, hidden: torch.Tensor, targets: torch.Tensor, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the statistics (7, N) and d logprob / d hidden, (N, H) float32 at least, in one sweep.

    The arguments are those of score_rows. The gradient is (1 - p_t) (W[target] - sum_j≠t p_j / (1 - p_t) W_j). The sum
    is attention of the other classes with the weight as keys and values, so it can be kept relative to the largest
    logit so far and shrunk whenever that grows, as in FlashAttention (arXiv 2205.14135). It is NaN for a target
    outside the vocabulary.
    """
    plan, tiles = head.plan, head.plan.scoring
    if head.shard is not None:
        targets = head.shard.local(targets)
    state = new_state(hidden.shape[0], hidden.device)
    total = torch.zeros(hidden.shape, dtype=plan.sum_dtype, device=head.weight.device)
    scratch = pooled_empty((tiles.num_rows, tiles.num_columns), plan.logits_dtype, head.weight.device)
    gradients = scratch
    if plan.limits.narrow_gradients:
        gradients = pooled_empty((tiles.num_rows, tiles.num_columns), plan.product_dtype, head.weight.device)
    lse_gradient = head.kernels.lse_gradient or functools.partial(row_lse_gradient_by_two, head.kernels)
    for columns in tiles.columns:
        weight = head.cast_tile(columns) if plan.casts_weight else head.weight[columns]
        bias = None if head.bias is None else head.bias[columns]
        for rows in tiles.rows:
            corner = (slice(rows.stop - rows.start), slice(columns.stop - columns.start))
            tile, gradient, row_state = scratch[corner], gradients[corner], state[:, rows]
            mm_into(tile, hidden[rows], weight.t())
            top = row_state[TOP].clone()
            given = (tile, targets[rows], bias, *head.transform, outputs, columns.start, row_state)
            lse_gradient(*given, gradient)
            rows_total = total[rows]
            rows_total.mul_(_shrinkage(top, row_state[TOP])[:, None].to(total.dtype))
            add_mm(rows_total, gradient, weight)
    own_top = state[TOP]
    if head.shard is not None:
        state = head.shard.merged(state)
    statistics = finish_scores(state, outputs, head.vocab_size, plan.sum_dtype)
    derivative = head.transform.derivative(state[TARGET]).to(total.dtype)
    own = head.weight[targets.clamp(0, plan.vocab_size - 1)].to(total.dtype)
    if head.shard is not None:
        total.mul_(_shrinkage(own_top, state[TOP])[:, None].to(total.dtype))
        derivative = derivative.masked_fill((targets < 0) | (targets >= plan.vocab_size), 0.0)
    # Without other classes both are 0.
    mean = total.div_(state[SUM][:, None].to(total.dtype).clamp(min=1))
    unit_gradient = mean.neg_().addcmul_(derivative[:, None], own)
    if head.shard is not None:
        head.shard.add_up(unit_gradient)
    return statistics, unit_gradient.mul_(-torch.expm1(statistics[LOGPROB_ROW])[:, None])


def new_state(num_rows: int, device: torch.device) -> torch.Tensor:
    """Returns the state (7, R) of rows of which nothing has been seen; a target that never comes stays NaN."""
    state = torch.zeros(NUM_STATES, num_rows, dtype=torch.float64, device=device)
    state[TOP] = state[BEFORE] = float("-inf")
    state[TARGET] = float("nan")
    return state


def finish_scores(state: torch.Tensor, outputs: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Computes the statistics (7, R) of rows whose every column has been seen.

    Returns, in `dtype`: lse, logprob, entropy, log of the sum of squared probabilities, mean logit, 1.0 where the
    target is the first argmax, and what rounding lse to `dtype` lost. Rows that `outputs` did not ask for are NaN. So
    is all but the mean logit and the argmax where the target never came: the gradient then is NaN like the loss.
    """
    statistics = torch.full((NUM_STATISTICS, state.shape[1]), float("nan"), dtype=dtype, device=state.device)
    # A softmax that has +inf is NaN.
    target = state[TARGET].masked_fill(state[TARGET] == float("inf"), float("nan"))
    # The largest of the others has 1 of the sum. Without others the sum is 0 and the largest -inf, which says it all.
    others = state[SUM].clamp(min=1)
    log_others = others.log()
    # The largest logit is subtracted first: with a large common offset, lse itself has lost digits.
    margin = (target - state[TOP]) - log_others
    statistics[LOGPROB_ROW] = F.logsigmoid(margin)
    lse = torch.logaddexp(target, state[TOP] + log_others)
    rounded = lse.to(dtype)
    statistics[LSE_ROW] = rounded
    statistics[LSE_LOW_ROW] = torch.where(rounded.isfinite(), lse - rounded, 0.0)
    if outputs & ENTROPY:
        # Of "target or another" and, times the probability of another, among the others: no term is negative.
        certainty = margin.abs().clamp(max=1e4)  # for infinities; e^-1e4 is 0
        either = certainty * torch.sigmoid(-certainty) - F.logsigmoid(certainty)
        statistics[ENTROPY_ROW] = either + torch.sigmoid(-margin) * (log_others - state[SUM_X] / others)
    if outputs & LOG_SUM_SQ_PROBS:
        # (1 - q)² + q² Σ_{j≠t} (p_j / q)², q being the probability of another: a sum that cannot cancel.
        concentration = state[SUM_SQ].log() - 2 * log_others
        statistics[LOG_SUM_SQ_ROW] = torch.logaddexp(
            2 * F.logsigmoid(margin), 2 * F.logsigmoid(-margin) + concentration
        )
    if outputs & MEAN_LOGITS:
        statistics[MEAN_LOGITS_ROW] = state[TOTAL] / vocab_size
    if outputs & IS_TOP1:
        statistics[IS_TOP1_ROW] = ((state[TARGET] >= state[TOP]) & (state[TARGET] > state[BEFORE])).to(dtype)
    return statistics


def _shrinkage(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Returns the factor (R,) by which sums relative to the largest logit `before` shrink when it becomes `after`."""
    return torch.where(before == float("-inf"), 0.0, torch.exp(before - after))
