"""Registers the head's torch.library ops: hidden states and the head's weight in, statistics per token out.

`trl_fast::linear_scores` is the forward pass. What it keeps for backward is its `cache`, chosen by the caller:

| keep | cache | passes over N·V·H, forward + backward |
|---|---|---|
| NOTHING | empty | 1 without gradient |
| LOGITS | KeptLogits.values of as many rows as fit the workspace | 1 + 2 for those rows, 1 + 3 for the others |
| UNIT_GRADIENT | (N, H): d logprob / d hidden, for a frozen head | 2 + 0 |

`trl_fast::linear_scores_backward` takes the row coefficients of `row_kernels.py`, and so serves every differentiable
output. Rows whose coefficients are all zero take no part in it.

`trl_fast::linear_scores_sparse` keeps a sample of the probabilities instead (see sparse_gradient.py): one pass in all.

`differentiable_scores` is the way in: it checks the inputs, chooses the backend and calls the op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from ..backends import choose_backend
from ..device import device_facts
from ..named_gradients import AutogradContext, first_derivative, gradients_of, needs_gradients
from ..validation import check_head_call, check_sparse
from .fused_kernel import fused_tiles
from .gradients import HeadGradients, Needs, head_gradients
from .kept_logits import KeptLogits
from .logit_transform import LogitTransform
from .plan import LOGITS, NOTHING, RAW_BLOCKS, UNIT_GRADIENT, HeadOptions, plan_head
from .row_kernels import ROW_KERNELS
from .row_statistics import (
    ENTROPY_ROW,
    LOGPROB_ROW,
    LSE_ROW,
    MEAN_LOGITS_ROW,
    NUM_STATISTICS,
    Upstream,
    row_coefficients,
)
from .sparse_gradient import sparse_gradients, sparse_kernels_of
from .sweep import empty_kept_logits, score_rows, score_rows_and_keep, score_rows_with_unit_gradient
from .tiled_head import TiledHead
from .vocabulary_shard import VocabularyShard


class DifferentiableScores(NamedTuple):
    """Holds (N,) tensors with gradients, where the kind of gradient has them, and all statistics (7, N) without."""

    lse: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor | None
    statistics: torch.Tensor


def differentiable_scores(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    options: HeadOptions,
    shard: VocabularyShard | None = None,
) -> DifferentiableScores:
    """Scores the targets (N,) of hidden (N, H) under a head of weight (V, H) and bias (V,) or None.

    op: the public op's name, for messages; outputs: mask of the statistics to compute; shard: which columns of the
    whole head's vocabulary the V are.

    Raises:
        ValueError, RuntimeError: as in linear_logprob.
    """
    facts = device_facts(hidden.device)
    workspace_bytes = options.workspace_on(hidden.device, facts, shard)
    hidden = check_head_call(hidden, weight, targets, bias, shard)
    backend = choose_backend(op, options.backend, facts, hidden.dtype)
    keep = what_to_keep(hidden, weight.requires_grad or (bias is not None and bias.requires_grad))
    given = (hidden, weight, targets.long(), bias)
    if options.head_grad == "sparse" and keep != NOTHING:
        offsets = torch.rand(hidden.shape[0], dtype=torch.float64, device=hidden.device)
        check_sparse(shard)
        numbers = (*transform, outputs, options.sparse_threshold, workspace_bytes, backend)
        logprobs, entropy, statistics, *_ = linear_scores_sparse(*given, offsets, *numbers)
        return DifferentiableScores(statistics[LSE_ROW].detach(), logprobs, entropy, None, statistics.detach())
    numbers = (*transform, outputs, keep, workspace_bytes, backend, *(shard or ()))
    lse, logprobs, entropy, mean_logits, statistics, *_ = linear_scores(*given, *numbers)
    return DifferentiableScores(lse, logprobs, entropy, mean_logits, statistics.detach())


def what_to_keep(hidden: torch.Tensor, head_trains: bool) -> int:
    """Returns what the forward pass keeps for a backward pass, by the table above. hidden: (N, H)."""
    if not torch.is_grad_enabled() or not (head_trains or hidden.requires_grad):
        return NOTHING
    return LOGITS if head_trains else UNIT_GRADIENT


def planned_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    keep: int,
    workspace_bytes: int,
    backend: str,
    shard: VocabularyShard | None = None,
) -> TiledHead:
    """Plans the sweeps over hidden (N, H), and returns the head with its plan.

    weight: (V, H); bias: (V,) or None; keep: what of the logits is kept (see plan.py); shard: which columns these are.

    Raises:
        ValueError: the workspace holds no row of logits.
    """
    facts = device_facts(weight.device)
    kernels, capped = facts.row_kernels or ROW_KERNELS[backend], transform.softcap != 0.0
    plan = plan_head(
        hidden.shape[0],
        weight.shape if shard is None else (shard.widest, weight.shape[1]),
        dtype=hidden.dtype,
        weight_dtype=weight.dtype,
        capped=capped,
        keep=keep,
        kernels=kernels,
        workspace_bytes=workspace_bytes,
        facts=facts,
        find_fused=functools.partial(fused_tiles, backend, weight.shape[1], device=weight.device, capped=capped),
    )
    if shard is None:
        return TiledHead(weight, bias, transform, plan, kernels, plan.vocab_size)
    return TiledHead(weight, bias, transform, plan.narrowed(weight.shape[0]), kernels, shard.vocab_size, shard)


@torch.library.custom_op("trl_fast::linear_scores", mutates_args=())
def linear_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    keep: int,
    workspace_bytes: int,
    backend: str,
    first: int = 0,
    vocab_size: int = 0,
    widest: int = 0,
    group: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns lse, logprobs, entropy, mean_logits (N,), all statistics (7, N), the cache (see the module), its tops.

    hidden: (N, H); weight: (V, H); targets: (N,) int64; statistics float32, NaN where `outputs` did not ask for them;
    first, vocab_size, widest, group: of VocabularyShard.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        transform = LogitTransform(scale, softcap, inv_temperature)
        shard = VocabularyShard(first, vocab_size, widest, group) if group else None
        head = planned_head(hidden, weight, bias, transform, keep, workspace_bytes, backend, shard)
        product = hidden.to(head.plan.product_dtype)
        cache, tops = product.new_empty(0, 0, 0), hidden.new_empty(0, dtype=torch.float32)
        if keep == UNIT_GRADIENT:
            statistics, cache = _score_with_unit_gradient(head, product, targets, outputs)
        elif keep == LOGITS:
            statistics, logits = score_rows_and_keep(head, product, targets, outputs)
            cache, tops = logits.values, tops if logits.tops is None else logits.tops
        else:
            statistics = score_rows(head, product, targets, outputs)
        rows = (LSE_ROW, LOGPROB_ROW, ENTROPY_ROW, MEAN_LOGITS_ROW)
        lse, logprobs, entropy, mean_logits = (statistics[row].clone() for row in rows)
        return lse, logprobs, entropy, mean_logits, statistics, cache, tops


def _score_with_unit_gradient(
    head: TiledHead, hidden: torch.Tensor, targets: torch.Tensor, outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the statistics (7, N) of all rows and d logprob / d hidden, (N, H) float32 at least."""
    plan, num_rows = head.plan, hidden.shape[0]
    if plan.limits.policy.one_sweep:
        return score_rows_with_unit_gradient(head, hidden, targets, outputs)
    gradients = HeadGradients(head, num_rows, Needs(hidden=True, weight=False, bias=False), waiting=True)
    statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=plan.sum_dtype, device=head.weight.device)
    logits = empty_kept_logits(head)
    for rows in plan.blocks(num_rows):
        kept = logits.part(slice(rows.stop - rows.start))
        found = score_rows(head, hidden[rows], targets[rows], outputs, keep=kept)
        ones = torch.ones_like(found[LOGPROB_ROW])
        coefficients = row_coefficients(found, head.vocab_size, grad_logprobs=ones)
        given = (hidden[rows], targets[rows], found[LSE_ROW], coefficients, kept)
        gradients.add(rows, *given, consume=True, last=rows.stop == num_rows)
        statistics[:, rows] = found
    return statistics, gradients.results(plan.sum_dtype, plan.sum_dtype)[0]


@linear_scores.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    keep: int,
    workspace_bytes: int,
    backend: str,
    first: int = 0,
    vocab_size: int = 0,
    widest: int = 0,
    group: str = "",
) -> tuple[torch.Tensor, ...]:
    transform = LogitTransform(scale, softcap, inv_temperature)
    shard = VocabularyShard(first, vocab_size, widest, group) if group else None
    head = planned_head(hidden, weight, bias, transform, keep, workspace_bytes, backend, shard)
    num_rows, sums = hidden.shape[0], head.plan.sum_dtype
    rows = [hidden.new_empty(num_rows, dtype=sums) for _ in range(4)]
    cache = hidden.new_empty(0, 0, 0, dtype=head.plan.product_dtype)
    tops = hidden.new_empty(0, dtype=torch.float32)
    if keep == UNIT_GRADIENT:
        cache = hidden.new_empty(hidden.shape, dtype=sums)
    elif keep == LOGITS:
        logits = empty_kept_logits(head)
        cache, tops = logits.values, tops if logits.tops is None else logits.tops
    return (*rows, hidden.new_empty((NUM_STATISTICS, num_rows), dtype=sums), cache, tops)


@torch.library.custom_op("trl_fast::linear_scores_backward", mutates_args=())
def linear_scores_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    logits: torch.Tensor,
    tops: torch.Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int,
    backend: str,
    first: int = 0,
    vocab_size: int = 0,
    widest: int = 0,
    group: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of hidden (N, H), weight (V, H), bias (V,) that are needed, from row coefficients (4, N).

    logits, tops: of KeptLogits of the first rows, which the forward pass kept; they are left as they are. first,
    vocab_size, widest, group: of VocabularyShard.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        transform = LogitTransform(scale, softcap, inv_temperature)
        shard = VocabularyShard(first, vocab_size, widest, group) if group else None
        head = planned_head(hidden, weight, bias, transform, LOGITS, workspace_bytes, backend, shard)
        kept = KeptLogits(logits, tops if len(tops) else None, head.plan.kept_columns, head.plan.chunk)
        needs = Needs(need_hidden, need_weight, need_bias)
        return head_gradients(head, needs, hidden, targets, lse, coefficients, kept)


@linear_scores_backward.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, ...]:
    # After lse, coefficients, logits, tops and the transform; arguments that have their defaults are not there.
    need_hidden, need_weight, need_bias = options[7:10]
    return _empty_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _empty_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns tensors like the gradients of hidden (N, H), weight (V, H) and bias (V,)."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside tensors."""

    transform: list[float]
    keep: int
    workspace_bytes: int
    backend: str
    shard: VocabularyShard | None


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, *transform, _, keep, workspace_bytes, backend = inputs[:11]
    *_, statistics, cache, tops = output
    ctx.set_materialize_grads(False)
    # A copy: the caller may change what it was given.
    ctx.save_for_backward(hidden, weight, targets, bias, statistics.clone(), cache, tops)
    ctx.transform, ctx.keep, ctx.workspace_bytes, ctx.backend = transform, keep, workspace_bytes, backend
    ctx.shard = VocabularyShard(*inputs[11:]) if inputs[-1] else None


@first_derivative("the head (linear_logprob)")
def _backward(ctx: _Context, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, targets, bias, statistics, cache, tops = ctx.saved_tensors
    upstream = Upstream(*gradients[:4])
    vocab_size = weight.shape[0] if ctx.shard is None else ctx.shard.vocab_size
    coefficients = upstream.coefficients(statistics, vocab_size, ctx.keep == UNIT_GRADIENT)
    if coefficients is None:
        return gradients_of(_OP, hidden=upstream.of_unit_gradient(cache, hidden.dtype))
    kept = cache if ctx.keep == LOGITS else hidden.new_empty(0, 0, 0)
    given = (hidden, weight, targets, bias, statistics[LSE_ROW], coefficients, kept, tops, *ctx.transform)
    return _needed_gradients(
        ctx, _OP, linear_scores_backward, given, (ctx.workspace_bytes, ctx.backend, *(ctx.shard or ()))
    )


def _needed_gradients(
    ctx: AutogradContext,
    op: str,
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    given: tuple[object, ...],
    options: tuple[object, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Calls a backward op for the gradients of hidden, weight and bias that `op` needs, and names them."""
    names = ("hidden", "weight", "bias")
    needs = needs_gradients(ctx, op, *names)
    found = zip(names, backward(*given, *needs, *options), needs, strict=True)
    return gradients_of(op, **{name: gradient for name, gradient, needed in found if needed})


_OP = "trl_fast::linear_scores"
linear_scores.register_autograd(_backward, setup_context=_setup_context)


# ---- the sparse gradient


@torch.library.custom_op("trl_fast::linear_scores_sparse", mutates_args=())
def linear_scores_sparse(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    outputs: int,
    threshold: float,
    workspace_bytes: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns logprobs, entropy (N,), all statistics (7, N), and the sample: counts (N,), columns and logprobs (E,).

    hidden: (N, H); weight: (V, H); targets: (N,) int64; offsets: (N,) float64 in [0, 1).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        transform = LogitTransform(scale, softcap, inv_temperature)
        head = planned_head(hidden, weight, bias, transform, RAW_BLOCKS, workspace_bytes, backend)
        sample = sparse_kernels_of(backend, hidden.device).samples
        hidden, sums = hidden.to(head.plan.product_dtype), head.plan.sum_dtype
        logits = empty_kept_logits(head)
        statistics = torch.empty(NUM_STATISTICS, hidden.shape[0], dtype=sums, device=hidden.device)
        samples = []
        for rows in head.plan.blocks(hidden.shape[0]):
            kept = logits.part(slice(rows.stop - rows.start))
            statistics[:, rows] = score_rows(head, hidden[rows], targets[rows], outputs, keep=kept)
            given = (statistics[LSE_ROW, rows], offsets[rows], threshold)
            samples.append(sample(kept.values, head.plan.vocab_size, bias, *transform, *given))
        empty = [offsets.new_empty(0, dtype=dtype) for dtype in (torch.int64, torch.int64, sums)]
        counts, columns, logprobs = (torch.cat(parts) for parts in zip(empty, *samples, strict=True))
        token_logprobs, entropy = statistics[LOGPROB_ROW].clone(), statistics[ENTROPY_ROW].clone()
        return token_logprobs, entropy, statistics, counts, columns, logprobs


@linear_scores_sparse.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *options: object) -> tuple[torch.Tensor, ...]:
    sums = torch.promote_types(hidden.dtype, torch.float32)
    num_rows, num_entries = hidden.shape[0], torch.library.get_ctx().new_dynamic_size()
    rows = [hidden.new_empty(num_rows, dtype=sums) for _ in range(2)]
    return (
        *rows,
        hidden.new_empty((NUM_STATISTICS, num_rows), dtype=sums),
        targets.new_empty(num_rows),
        targets.new_empty(num_entries),
        hidden.new_empty(num_entries, dtype=sums),
    )


@torch.library.custom_op("trl_fast::linear_scores_sparse_backward", mutates_args=())
def linear_scores_sparse_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    coefficients: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    logprobs: torch.Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    threshold: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the needed gradients of hidden (N, H), weight (V, H), bias (V,) from row coefficients (4, N)."""
    transform = LogitTransform(scale, softcap, inv_temperature)
    product = sparse_kernels_of(backend, hidden.device).product
    given = (hidden, weight, targets, bias, statistics, coefficients, counts, columns, logprobs)
    found = sparse_gradients(*given, transform, threshold, need_hidden, need_weight, need_bias, product)
    empty = _empty_gradients(hidden, weight, bias, False, False, False)
    pairs = zip(found, empty, strict=True)
    grad_hidden, grad_weight, grad_bias = (nothing if gradient is None else gradient for gradient, nothing in pairs)
    return grad_hidden, grad_weight, grad_bias


@linear_scores_sparse_backward.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> tuple[torch.Tensor, ...]:
    need_hidden, need_weight, need_bias = options[-4:-1]
    return _empty_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


class _SparseContext(AutogradContext, Protocol):
    """Names what the forward pass leaves for the sparse gradient beside tensors."""

    transform: list[float]
    threshold: float
    backend: str


def _setup_sparse_context(ctx: _SparseContext, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, bias, _, *transform, _, threshold, _, backend = inputs
    _, _, statistics, *samples = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, statistics, *samples)
    ctx.transform, ctx.threshold, ctx.backend = transform, threshold, backend


@first_derivative("the head (linear_logprob)")
def _sparse_backward(
    ctx: _SparseContext,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    *_: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, targets, bias, statistics, *samples = ctx.saved_tensors
    upstream = {"grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy}
    coefficients = row_coefficients(statistics, weight.shape[0], **upstream)
    given = (hidden, weight, targets, bias, statistics, coefficients, *samples, *ctx.transform, ctx.threshold)
    op = "trl_fast::linear_scores_sparse"
    return _needed_gradients(ctx, op, linear_scores_sparse_backward, given, (ctx.backend,))


linear_scores_sparse.register_autograd(_sparse_backward, setup_context=_setup_sparse_context)
