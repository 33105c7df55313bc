"""The head with a sparse, unbiased gradient: one pass over N·V·H in all, forward and backward.

`trl_fast::linear_scores_sparse` scores a row block, keeps a sample of its probabilities (see sparse_kernels.py) and
drops the logits. The gradient of a logit is p · (a + b · logp) plus the target's share (see row_kernels.py); with each
kept entry in the place of p its expectation over the sample is exact, and backward is two products of a sparse matrix.
"""

from __future__ import annotations

import torch

from ..slices import spans
from ..token_scores import ENTROPY_ROW, LOGPROB_ROW, LSE_LOW_ROW, LSE_ROW, NUM_STATISTICS
from .autograd import head_of, row_coefficients
from .gradients import score_rows
from .logit_transform import LogitTransform
from .row_kernels import finish_scores, new_state
from .sparse_kernels import sparse_kernels


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
        head = head_of(hidden, weight, bias, (scale, softcap, inv_temperature), workspace_bytes, backend)
        hidden = hidden.to(head.dtype)
        num_rows = hidden.shape[0]
        height = head.block_rows(num_rows, raw=True)
        logits = head.empty_logits(height, height, raw=True)
        statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=head.wide, device=hidden.device)
        samples = []
        for rows in spans(num_rows, max(height, 1)):
            kept = logits.part(slice(rows.stop - rows.start))
            state = new_state(rows.stop - rows.start, hidden.device)
            score_rows(head, hidden[rows], targets[rows], outputs, state, keep=kept)
            statistics[:, rows] = finish_scores(state, outputs, head.vocab_size, head.wide)
            given = (statistics[LSE_ROW, rows], offsets[rows], threshold)
            kernels = sparse_kernels(backend, hidden.device)
            samples.append(kernels.samples(kept.values, head.vocab_size, bias, *head.transform, *given))
        empty = [offsets.new_empty(0, dtype=dtype) for dtype in (torch.int64, torch.int64, head.wide)]
        counts, columns, logprobs = (torch.cat(parts) for parts in zip(empty, *samples, strict=True))
        token_logprobs, entropy = statistics[LOGPROB_ROW].clone(), statistics[ENTROPY_ROW].clone()
        return token_logprobs, entropy, statistics, counts, columns, logprobs


@linear_scores_sparse.register_fake
def _(hidden, weight, targets, bias, offsets, *options):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    num_rows, num_entries = hidden.shape[0], torch.library.get_ctx().new_dynamic_size()
    rows = [hidden.new_empty(num_rows, dtype=wide) for _ in range(2)]
    return (
        *rows,
        hidden.new_empty((NUM_STATISTICS, num_rows), dtype=wide),
        targets.new_empty(num_rows),
        targets.new_empty(num_entries),
        hidden.new_empty(num_entries, dtype=wide),
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
    """Gradients of hidden (N, H), weight (V, H), bias (V,), given row coefficients (4, N); empty where not needed."""
    transform = LogitTransform(scale, softcap, inv_temperature)
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    numbers = torch.arange(num_rows, device=hidden.device)
    rows = numbers.repeat_interleave(counts)
    lse, target_logprobs = statistics[LSE_ROW], statistics[LOGPROB_ROW]
    a, b, d, _ = coefficients
    values = logprobs.exp().clamp(min=threshold) * (a[rows] + b[rows] * logprobs)
    values = torch.cat(
        (values * transform.derivative(logprobs + lse[rows]), d * transform.derivative(target_logprobs + lse))
    )
    # A target outside the vocabulary has made its row NaN already.
    rows, columns = torch.cat((rows, numbers)), torch.cat((columns, targets.clamp(0, vocab_size - 1)))
    active = values != 0
    rows, columns, values = rows[active], columns[active], values[active]
    product = sparse_kernels(backend, hidden.device).product
    grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
    grad_bias = grad_weight.clone() if bias is None else bias.new_empty(0)
    if need_hidden:
        starts, order = _grouped(rows, num_rows)
        grad_hidden = product(starts, columns[order], values[order], weight, hidden.dtype)
    if need_weight or need_bias:
        starts, order = _grouped(columns, vocab_size)
    if need_weight:
        grad_weight = product(starts, rows[order], values[order], hidden, weight.dtype)
    if need_bias:
        ones = values.new_ones(1, 1)
        zeros = torch.zeros_like(order)
        grad_bias = product(starts, zeros, values[order], ones, values.dtype).squeeze(1).to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def _grouped(keys: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each group starts (G + 1,) once the entries are in `order` (E,)."""
    starts = keys.new_zeros(num_groups + 1)
    torch.cumsum(torch.bincount(keys, minlength=num_groups), dim=0, out=starts[1:])
    return starts, torch.argsort(keys, stable=True)


@linear_scores_sparse_backward.register_fake
def _(hidden, weight, targets, bias, *options):
    need_hidden, need_weight, need_bias, _ = options[-4:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, _, *transform, _, threshold, _, backend = inputs
    _, _, statistics, *samples = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, statistics, *samples)
    ctx.transform, ctx.threshold, ctx.backend = transform, threshold, backend


def _backward(ctx, grad_logprobs, grad_entropy, *_):
    hidden, weight, targets, bias, statistics, *samples = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    lse_low, entropy = statistics[LSE_LOW_ROW], statistics[ENTROPY_ROW]
    coefficients = row_coefficients(lse_low, entropy, weight.shape[0], None, grad_logprobs, grad_entropy, None)
    options = (*ctx.transform, ctx.threshold, *needs, ctx.backend)
    grads = linear_scores_sparse_backward(hidden, weight, targets, bias, statistics, coefficients, *samples, *options)
    hidden_grad, weight_grad, bias_grad = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (hidden_grad, weight_grad, None, bias_grad, *(None,) * 8)


linear_scores_sparse.register_autograd(_backward, setup_context=_setup_context)
