"""The head as torch.library ops: hidden states and the head's weight in, statistics per token out.

`trl_fast::linear_scores` is the forward pass. What it keeps for backward is its `cache`, chosen by the caller:

| keep | cache | passes over N·V·H, forward + backward |
|---|---|---|
| NOTHING | empty | 1 without gradient |
| LOGITS | KeptLogits.values of as many rows as fit the workspace | 1 + 2 for those rows, 1 + 3 for the others |
| UNIT_GRADIENT | (N, H): d logprob / d hidden, for a frozen head | 2 + 0 |

`trl_fast::linear_scores_backward` takes the row coefficients of `row_kernels.py`, and so serves every differentiable
output. Rows whose coefficients are all zero take no part in it.
"""

from __future__ import annotations

import torch

from ..matmul import gemm_dtype
from ..token_scores import ENTROPY_ROW, LOGPROB_ROW, LSE_LOW_ROW, LSE_ROW, MEAN_LOGITS_ROW, NUM_STATISTICS
from .gradients import HeadGradients, score_rows, score_with_unit_gradient
from .kept_logits import KeptLogits
from .logit_transform import LogitTransform
from .plan import Head
from .row_blocks import active_rows, row_blocks
from .row_kernels import finish_scores, new_state, with_low_part

NOTHING, LOGITS, UNIT_GRADIENT = range(3)


def head_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    transform: tuple[float, float, float],
    workspace_bytes: int,
    backend: str,
) -> Head:
    """The head as an op gets it: products in the dtype that suits `hidden`."""
    return Head(weight, bias, LogitTransform(*transform), gemm_dtype(hidden), backend, workspace_bytes)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns lse, logprobs, entropy, mean_logits (N,), all statistics (7, N), the cache (see the module), its tops.

    hidden: (N, H); weight: (V, H); targets: (N,) int64; statistics float32, NaN where `outputs` did not ask for them.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(hidden, weight, bias, (scale, softcap, inv_temperature), workspace_bytes, backend)
        hidden = hidden.to(head.dtype)
        num_rows = hidden.shape[0]
        state = new_state(num_rows, hidden.device)
        cache, tops = hidden.new_empty(0, 0, 0), hidden.new_empty(0, dtype=torch.float32)
        if keep == UNIT_GRADIENT:
            cache = score_with_unit_gradient(head, hidden, targets, outputs, state)
        elif keep == LOGITS:
            logits = head.empty_logits(head.kept_rows(num_rows), num_rows)
            score_rows(head, hidden, targets, outputs, state, keep=logits)
            cache, tops = logits.values, tops if logits.tops is None else logits.tops
        else:
            score_rows(head, hidden, targets, outputs, state)
        statistics = finish_scores(state, outputs, head.vocab_size, head.wide)
        differentiable = (statistics[row].clone() for row in (LSE_ROW, LOGPROB_ROW, ENTROPY_ROW, MEAN_LOGITS_ROW))
        return (*differentiable, statistics, cache, tops)


@linear_scores.register_fake
def _(hidden, weight, targets, bias, scale, softcap, inv_temperature, outputs, keep, workspace_bytes, backend):
    product = gemm_dtype(hidden)
    wide = torch.promote_types(product, torch.float32)
    num_rows = hidden.shape[0]
    rows = [hidden.new_empty(num_rows, dtype=wide) for _ in range(4)]
    cache, tops = hidden.new_empty(0, 0, 0, dtype=product), hidden.new_empty(0, dtype=torch.float32)
    if keep == UNIT_GRADIENT:
        cache = hidden.new_empty(hidden.shape, dtype=wide)
    elif keep == LOGITS:
        head = head_of(hidden, weight, bias, (scale, softcap, inv_temperature), workspace_bytes, backend)
        logits = head.empty_logits(head.kept_rows(num_rows), num_rows)
        cache, tops = logits.values, tops if logits.tops is None else logits.tops
    return (*rows, hidden.new_empty((NUM_STATISTICS, num_rows), dtype=wide), cache, tops)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,), given row coefficients (4, N); empty where not needed.

    logits, tops: of KeptLogits of the first rows, which the forward pass kept; they are left as they are.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = head_of(hidden, weight, bias, (scale, softcap, inv_temperature), workspace_bytes, backend)
        index = active_rows(coefficients)
        given = (hidden.to(head.dtype), targets, lse, coefficients.t())
        if index is not None:
            given = tuple(tensor[index] for tensor in given)
        kept = KeptLogits(logits, tops if len(tops) else None, head.kept_columns(hidden.shape[0]), head.chunk)
        blocks = row_blocks(slice(0, len(given[0])), *given, kept, index)
        needs = {"need_hidden": need_hidden, "need_weight": need_weight, "need_bias": need_bias}
        gradients = HeadGradients(head, len(given[0]), **needs)
        gradients.add(blocks, last=True)
        if index is not None and need_hidden:
            gradients.spread_hidden(index, hidden.shape[0])
        return gradients.results(hidden.dtype, weight.dtype if bias is None else bias.dtype)


@linear_scores_backward.register_fake
def _(hidden, weight, targets, bias, *options):
    need_hidden, need_weight, need_bias, _, _ = options[-5:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=weight.dtype if bias is None else bias.dtype),
    )


def row_coefficients(
    lse_low: torch.Tensor,
    entropy: torch.Tensor,
    vocab_size: int,
    grad_lse: torch.Tensor | None,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_mean_logits: torch.Tensor | None,
) -> torch.Tensor:
    """The rows a, b, d, e (4, N) of row_kernels.py's table, summed over the outputs that have an upstream gradient."""
    coefficients = lse_low.new_zeros((4, lse_low.shape[0]))
    a, b, d, e = coefficients
    if grad_lse is not None:
        a += grad_lse
    if grad_logprobs is not None:
        a -= grad_logprobs
        d += grad_logprobs
    if grad_entropy is not None:
        a -= grad_entropy * entropy
        b -= grad_entropy
    if grad_mean_logits is not None:
        e += grad_mean_logits / vocab_size
    return with_low_part(coefficients, lse_low)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, *transform, _, keep, workspace_bytes, backend = inputs
    lse, _, entropy, _, statistics, cache, tops = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, lse, statistics[LSE_LOW_ROW].clone(), entropy, cache, tops)
    ctx.transform, ctx.keep, ctx.workspace_bytes, ctx.backend = transform, keep, workspace_bytes, backend


def _backward(ctx, grad_lse, grad_logprobs, grad_entropy, grad_mean_logits, _statistics, _cache, _tops):
    hidden, weight, targets, bias, lse, lse_low, entropy, cache, tops = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    others = (grad_lse, grad_entropy, grad_mean_logits)
    no_gradients = (None,) * 7
    if ctx.keep == UNIT_GRADIENT and all(grad is None for grad in others):
        grad_hidden = None if grad_logprobs is None else (cache * grad_logprobs[:, None]).to(hidden.dtype)
        return (grad_hidden, None, None, None, *no_gradients)
    coefficients = row_coefficients(
        lse_low, entropy, weight.shape[0], grad_lse, grad_logprobs, grad_entropy, grad_mean_logits
    )
    grad_hidden, grad_weight, grad_bias = linear_scores_backward(
        hidden,
        weight,
        targets,
        bias,
        lse,
        coefficients,
        *((cache, tops) if ctx.keep == LOGITS else (hidden.new_empty(0, 0, 0), tops)),
        *ctx.transform,
        need_hidden,
        need_weight,
        need_bias,
        ctx.workspace_bytes,
        ctx.backend,
    )
    return (
        grad_hidden if need_hidden else None,
        grad_weight if need_weight else None,
        None,
        grad_bias if need_bias else None,
        *no_gradients,
    )


linear_scores.register_autograd(_backward, setup_context=_setup_context)
