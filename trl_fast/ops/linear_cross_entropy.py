"""Computes the cross-entropy from hidden states and the head's weight.

A summed or averaged loss has a gradient that is known as soon as a row is scored, so `trl_fast::linear_cross_entropy`
computes it in the forward pass, while the block's logits are still there: three passes over N·V·H, none recomputed.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from .backends import choose_backend
from .device import device_facts
from .head.autograd import differentiable_scores, planned_head
from .head.gradients import HeadGradients, Needs, waiting_dtype
from .head.logit_transform import LogitTransform
from .head.plan import BLOCKS, DEFAULT_SPARSE_THRESHOLD, HeadOptions
from .head.row_statistics import LOGPROB_ROW, LSE_ROW, MEAN_LOGITS, MEAN_LOGITS_ROW, row_coefficients
from .head.sweep import empty_kept_logits, score_rows
from .head.vocabulary_shard import VocabularyShard
from .matmul import gemm_dtype
from .memory_pool import scaled
from .named_gradients import AutogradContext, first_derivative, gradients_of, needs_gradients
from .validation import check_head_call, check_head_tensors

REDUCTIONS = ("mean", "sum", "none")
_OP = "trl_fast::linear_cross_entropy"


def token_losses(
    lse: torch.Tensor, logprobs: torch.Tensor, mean_logits: torch.Tensor | None, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """Computes the loss of each row, (N,): -(1-ε)·logprob - ε·mean(logp) + z·lse².

    ε is label smoothing (Szegedy et al., arXiv 1512.00567, section 7), z the auxiliary z-loss (PaLM, arXiv 2204.02311,
    section 5). Terms with a zero factor are left out, so that mean_logits may then be NaN or None.
    """
    losses = -(1 - label_smoothing) * logprobs
    if label_smoothing:
        assert mean_logits is not None, "label smoothing asks the head for them"
        losses = losses - label_smoothing * (mean_logits - lse)
    if z_loss:
        losses = losses + z_loss * lse.square()
    return losses


@torch.library.custom_op(_OP, mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    divisor: torch.Tensor,
    scale: float,
    softcap: float,
    inv_temperature: float,
    label_smoothing: float,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int,
    backend: str,
    first: int = 0,
    vocab_size: int = 0,
    widest: int = 0,
    group: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the rows' summed losses over `divisor` (0-d), and the gradients of hidden, weight, bias if needed.

    Gradients have the dtypes of their tensors; those of float16 tensors wait in float32 for the factor of the loss.
    first, vocab_size, widest, group: of VocabularyShard.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        transform = LogitTransform(scale, softcap, inv_temperature)
        shard = VocabularyShard(first, vocab_size, widest, group) if group else None
        head = planned_head(hidden, weight, bias, transform, BLOCKS, workspace_bytes, backend, shard)
        needs, num_rows = Needs(need_hidden, need_weight, need_bias), hidden.shape[0]
        hidden_dtype, hidden = hidden.dtype, hidden.to(head.plan.product_dtype)
        total = torch.zeros((), dtype=head.plan.sum_dtype, device=hidden.device)
        divisor = divisor.to(total.dtype)
        gradients = HeadGradients(head, num_rows, needs, waiting=True)
        logits = empty_kept_logits(head) if any(needs) else None
        outputs = MEAN_LOGITS if label_smoothing else 0
        for rows in head.plan.blocks(num_rows):
            kept = None if logits is None else logits.part(slice(rows.stop - rows.start))
            statistics = score_rows(head, hidden[rows], targets[rows], outputs, keep=kept)
            lse, logprobs, mean_logits = (statistics[row] for row in (LSE_ROW, LOGPROB_ROW, MEAN_LOGITS_ROW))
            total += token_losses(lse, logprobs, mean_logits, label_smoothing, z_loss).sum()
            if any(needs):
                coefficients = _coefficients(statistics, divisor, head.vocab_size, label_smoothing, z_loss)
                given = (hidden[rows], targets[rows], lse, coefficients, kept)
                gradients.add(rows, *given, consume=True, last=rows.stop == num_rows)
        return (total / divisor, *gradients.results(hidden_dtype, weight.dtype if bias is None else bias.dtype))


def _coefficients(
    statistics: torch.Tensor, divisor: torch.Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """Returns the coefficients (4, R) of row_kernels.py for `token_losses` over `divisor`; statistics: (7, R)."""
    lse = statistics[LSE_ROW]
    upstream = {"grad_logprobs": torch.full_like(lse, label_smoothing - 1) / divisor}
    if label_smoothing or z_loss:
        upstream["grad_lse"] = (label_smoothing + 2 * z_loss * lse) / divisor
    if label_smoothing:
        upstream["grad_mean_logits"] = torch.full_like(lse, -label_smoothing) / divisor
    return row_coefficients(statistics, vocab_size, **upstream)


@_linear_cross_entropy.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None, *options: object
) -> tuple[torch.Tensor, ...]:
    # After the divisor, the transform and the two factors; arguments that have their defaults are not there.
    need_hidden, need_weight, need_bias = options[6:9]
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty((), dtype=torch.promote_types(gemm_dtype(hidden), torch.float32)),
        hidden.new_empty(hidden.shape if need_hidden else 0, dtype=waiting_dtype(hidden.dtype)),
        weight.new_empty(weight.shape if need_weight else 0, dtype=waiting_dtype(weight.dtype)),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=waiting_dtype(bias_dtype)),
    )


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside the gradients of hidden, weight and bias."""

    dtypes: list[torch.dtype]


def _setup_context(ctx: _Context, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    hidden, weight, _, bias, *_ = inputs
    # Without a bias it is not looked at.
    ctx.dtypes = [hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype]


@first_derivative("linear_cross_entropy")
def _backward(
    ctx: _Context, grad_loss: torch.Tensor | None, *_: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return gradients_of(_OP)
    names = ("hidden", "weight", "bias")
    saved = zip(names, ctx.saved_tensors, ctx.dtypes, needs_gradients(ctx, _OP, *names), strict=True)
    return gradients_of(_OP, **{name: scaled(one, grad_loss, dtype) for name, one, dtype, needed in saved if needed})


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _check_options(reduction: str, label_smoothing: float, z_loss: float, head_grad: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: unknown value {reduction!r}; expected one of {REDUCTIONS}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must not be negative and be finite, got {z_loss!r}")
    if head_grad == "sparse" and (label_smoothing or z_loss):
        raise ValueError(
            f"head_grad='sparse' has no gradient of label_smoothing={label_smoothing} or z_loss={z_loss}; expected 0"
        )


def _divisor(
    reduction: str, num_items: int | torch.Tensor | None, num_kept: int, hidden: torch.Tensor
) -> torch.Tensor:
    if num_items is None:
        num_items = max(num_kept, 1) if reduction == "mean" else 1
    elif isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number of tokens, got shape {tuple(num_items.shape)}")
        return num_items.detach().reshape(()).to(hidden.device, torch.float64).clamp(min=1)
    elif not 1 <= num_items < math.inf:
        raise ValueError(f"num_items: expected a number of tokens of at least 1, got {num_items!r}")
    return torch.full((), num_items, dtype=torch.float64, device=hidden.device)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: int | torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    head_grad: str = "exact",
    sparse_threshold: float = DEFAULT_SPARSE_THRESHOLD,
    shard: VocabularyShard | None = None,
) -> torch.Tensor:
    """Computes the cross-entropy of cap(logit_scale · (hidden weightᵀ + bias)) / temperature.

    Ignored rows never reach the head.

    Args:
        hidden: (N, H) float32|bfloat16|float16.
        weight: (V, H), dtype of hidden (any float dtype under autocast).
        targets: (N,) integer in [0, V), or ignore_index.
        bias, temperature, softcap, logit_scale, workspace_bytes, backend, head_grad, sparse_threshold, shard: as in
            linear_logprob; the sparse gradient has neither label smoothing nor z-loss.
        label_smoothing: ε in [0, 1], mass spread evenly over the vocabulary.
        z_loss: factor of lse², added to every token's loss.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        num_items: divisor of the sum instead of the number of rows (tokens of an accumulation window), at least 1; a
            tensor below 1 counts as 1, since to look at it would make a GPU's host wait.

    Returns:
        0-d float32; (N,) float32 with zeros at ignored rows for "none". With no row left, a differentiable zero.

    Raises:
        ValueError, RuntimeError: as in linear_logprob; and for unknown reductions or factors out of range.
    """
    _check_options(reduction, label_smoothing, z_loss, head_grad)
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    options = HeadOptions(backend, workspace_bytes, head_grad, sparse_threshold)
    hidden = check_head_tensors(hidden, weight, targets, bias)
    num_rows = hidden.shape[0]
    # The one wait of a GPU's host: a mask as an index would be counted again at every use.
    kept = (targets != ignore_index).nonzero().squeeze(1)
    if len(kept) < num_rows:
        hidden, targets = hidden[kept], targets[kept]
    divisor = _divisor(reduction, num_items, len(kept), hidden)
    given = (hidden, weight, targets, bias, transform, label_smoothing, z_loss, options, shard)
    if reduction == "none":
        losses = _row_losses(*given)
        return losses if len(kept) == num_rows else losses.new_zeros(num_rows).index_copy(0, kept, losses)
    if head_grad == "exact":
        return _summed_loss(*given, divisor)
    losses = _row_losses(*given)
    return losses.sum() / divisor.to(losses.dtype)


def _row_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    label_smoothing: float,
    z_loss: float,
    options: HeadOptions,
    shard: VocabularyShard | None,
) -> torch.Tensor:
    """Computes the loss of each row, (N,); its gradient is computed in the backward pass."""
    outputs = MEAN_LOGITS if label_smoothing else 0
    given = (hidden, weight, targets, bias, transform, outputs, options, shard)
    scores = differentiable_scores("linear_cross_entropy", *given)
    return token_losses(scores.lse, scores.logprobs, scores.mean_logits, label_smoothing, z_loss)


def _summed_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    label_smoothing: float,
    z_loss: float,
    options: HeadOptions,
    shard: VocabularyShard | None,
    divisor: torch.Tensor,
) -> torch.Tensor:
    """Computes the sum of the rows' losses over `divisor`, and its gradient with it."""
    check_head_call(hidden, weight, targets, bias, shard)
    facts = device_facts(hidden.device)
    grad_enabled = torch.is_grad_enabled()
    loss, *_ = _linear_cross_entropy(
        hidden,
        weight,
        targets.long(),
        bias,
        divisor,
        *transform,
        label_smoothing,
        z_loss,
        grad_enabled and hidden.requires_grad,
        grad_enabled and weight.requires_grad,
        grad_enabled and bias is not None and bias.requires_grad,
        options.workspace_on(hidden.device, facts, shard),
        choose_backend("linear_cross_entropy", options.backend, facts, hidden.dtype),
        *(shard or ()),
    )
    return loss
