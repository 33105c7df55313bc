"""Any loss that is a sum over tokens, straight from hidden states and the head's weight.

How much a row of such a loss weighs is known as soon as the row is scored, so its gradient is taken in the forward
pass, while the row's logits are still there: three passes over N·V·H, two with a frozen head, and none recomputed.
GRPO, PPO, weighted likelihood and DFT (arXiv 2508.05629) are of this kind.

Sequence losses such as DPO weigh a row by all that it belongs with: `group_sizes` says what that is. Groups are scored
together, and their gradient taken while their logits are there; only the rows of a group that does not fit the
workspace are computed again, a fourth pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .backends import choose_backend
from .head.autograd import row_coefficients
from .head.gradients import HeadGradients, score_rows
from .head.kept_logits import KeptLogits
from .head.logit_transform import LogitTransform
from .head.plan import Head, workspace_of
from .head.row_blocks import active_rows, row_blocks
from .head.row_kernels import finish_scores, new_state
from .linear_logprob import autocast_hidden, linear_logprob
from .matmul import gemm_dtype
from .memory_pool import scaled
from .slices import group_spans, spans
from .token_scores import (
    ENTROPY_ROW,
    LSE_LOW_ROW,
    LSE_ROW,
    NUM_STATISTICS,
    TokenScores,
    detached,
    output_mask,
    token_scores,
)
from .validation import check_finite, check_head_inputs, check_target_range

TokenLoss = Callable[[TokenScores, torch.Tensor], torch.Tensor]


class ScoredLoss(NamedTuple):
    """loss: 0-d, differentiable; scores: what the head says about all N tokens, without gradient."""

    loss: torch.Tensor
    scores: TokenScores


def _summed(loss: object) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"token_loss: expected a summed loss, a 0-d tensor, got {got}")
    return loss


def _block_loss(
    token_loss: TokenLoss, statistics: torch.Tensor, rows: torch.Tensor, outputs: tuple[str, ...], vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (0-d) of a row block and its coefficients (4, R), from the derivatives of the loss by its scores."""
    scores = token_scores(statistics, outputs)
    leaves = [scores.logprobs.detach().requires_grad_()]
    scores = replace(scores, logprobs=leaves[0])
    if scores.entropy is not None:
        leaves.append(scores.entropy.detach().requires_grad_())
        scores = replace(scores, entropy=leaves[1])
    with torch.enable_grad():
        loss = _summed(token_loss(scores, rows))
    grads = [None] * 2
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        grads[: len(found)] = found
    entropy, lse_low = statistics[ENTROPY_ROW], statistics[LSE_LOW_ROW]
    return loss.detach(), row_coefficients(lse_low, entropy, vocab_size, None, grads[0], grads[1], None)


class _TokenLossSweep:
    """Scores row blocks, asks `token_loss` what they weigh, and adds up the loss and the head's gradients."""

    def __init__(
        self,
        head: Head,
        num_rows: int,
        token_loss: TokenLoss,
        outputs: tuple[str, ...],
        group_sizes: Sequence[int] | None,
        skip_zero_rows: bool | None,
    ) -> None:
        self.head = head
        self.token_loss = token_loss
        self.outputs = outputs
        self.group_sizes = group_sizes
        self.skip_zero_rows = skip_zero_rows
        device = head.weight.device
        self.loss = torch.zeros((), dtype=head.wide, device=device)
        self.statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=head.wide, device=device)

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, rows: slice, keep: KeptLogits | None) -> torch.Tensor:
        """Adds the rows' loss; their coefficients (4, R). keep: takes the logits of the first rows."""
        mask = output_mask(self.outputs)
        state = new_state(rows.stop - rows.start, hidden.device)
        score_rows(self.head, hidden[rows], targets[rows], mask, state, keep=keep)
        statistics = finish_scores(state, mask, self.head.vocab_size, self.head.wide)
        self.statistics[:, rows] = statistics
        numbers = torch.arange(rows.start, rows.stop, device=hidden.device)
        loss, coefficients = _block_loss(self.token_loss, statistics, numbers, self.outputs, self.head.vocab_size)
        self.loss += loss
        return coefficients

    def differentiate(self, hidden: torch.Tensor, targets: torch.Tensor, gradients: HeadGradients) -> None:
        """Scores all rows (N, H), block by block, and adds their gradients while the logits are there."""
        num_rows = hidden.shape[0]
        # Groups are of any size: the more room, the more of them stay whole.
        height = self.head.block_rows(num_rows) if self.group_sizes is None else self.head.kept_rows(num_rows)
        logits = self.head.empty_logits(height, height)
        indices: list[torch.Tensor | None] = []
        done, step = 0, max(height, 1)
        for rows in spans(num_rows, step) if self.group_sizes is None else group_spans(self.group_sizes, step):
            kept = logits.part(slice(rows.stop - rows.start))
            coefficients = self.score(hidden, targets, rows, kept)
            index = active_rows(coefficients, self.skip_zero_rows)
            given = (hidden[rows], targets[rows], self.statistics[LSE_ROW, rows], coefficients.t())
            if index is not None:
                given = tuple(tensor[index] for tensor in given)
            place = slice(done, done + len(given[0]))
            gradients.add(row_blocks(place, *given, kept, index, consume=True), last=rows.stop == num_rows)
            indices.append(
                torch.arange(rows.start, rows.stop, device=hidden.device) if index is None else rows.start + index
            )
            done = place.stop
        if gradients.hidden is not None and done < num_rows:
            gradients.spread_hidden(torch.cat(indices), num_rows)


class _LinearTokenLoss(torch.autograd.Function):
    """Not a torch.library op, because those take no functions; torch.compile breaks its graph here."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, sweep):
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        needs = {"need_hidden": need_hidden, "need_weight": need_weight, "need_bias": need_bias}
        gradients = HeadGradients(sweep.head, hidden.shape[0], **needs, waiting=True)
        product = hidden.to(sweep.head.dtype)
        if any(needs.values()):
            sweep.differentiate(product, targets, gradients)
        else:
            sweep.score(product, targets, slice(0, hidden.shape[0]), keep=None)
        ctx.save_for_backward(*gradients.results(hidden.dtype, weight.dtype if bias is None else bias.dtype))
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sweep.statistics)
        return sweep.loss, sweep.statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        grads = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        return (*(scaled(grad, grad_loss, dtype) if need else None for grad, dtype, need in grads), None, None)


def _head_trains(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _check_groups(group_sizes: Sequence[int] | None, num_rows: int) -> None:
    if group_sizes is not None and (min(group_sizes, default=0) < 0 or sum(group_sizes) != num_rows):
        raise ValueError(
            f"group_sizes: expected numbers of rows that sum to the {num_rows} of hidden, got {list(group_sizes)[:8]} "
            f"with the sum {sum(group_sizes)}"
        )


@torch.compiler.disable
def linear_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_loss: TokenLoss,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("logprobs",),
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group_sizes: Sequence[int] | None = None,
    skip_zero_rows: bool | None = None,
) -> ScoredLoss:
    """A sum over tokens of any differentiable function of their log-probability and entropy.

    Rows to which `token_loss` gives no gradient (masked, clipped, zero advantage) take no part in the products of the
    gradient.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, workspace_bytes, backend: as in
            linear_logprob.
        token_loss: called once a row block with its TokenScores of (R,) tensors, of which logprobs and entropy are
            differentiable, and the rows' numbers (R,) int64 among the N; returns the block's share of the loss, a 0-d
            tensor. The loss is the sum of all shares, so a mean has to be divided by a number that is known before.
        outputs: what token_loss and the caller want to see, as in linear_logprob.
        group_sizes: how many consecutive rows belong together, summing to N; token_loss is then given whole groups,
            one or several at a time. None: every row stands alone.
        skip_zero_rows: whether rows that the loss gives no gradient leave before the backward products. To find out
            makes the host of a GPU wait, once a row block; None: on a CPU.

    Returns:
        ScoredLoss. With no rows the loss is a differentiable zero.

    Raises:
        ValueError, RuntimeError: as in linear_logprob; and if token_loss returns anything but a 0-d tensor, or the
            group sizes are not those of N rows.
    """
    _check_groups(group_sizes, hidden.shape[0])
    if group_sizes is not None and not _head_trains(weight, bias):
        # d logprob / d hidden needs no loss, so with a frozen head no group has to fit anywhere.
        numbers = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "bias": bias}
        options = {**numbers, "outputs": outputs, "workspace_bytes": workspace_bytes, "backend": backend}
        scores = linear_logprob(hidden, weight, targets, **options)
        loss = _summed(token_loss(scores, torch.arange(hidden.shape[0], device=hidden.device)))
        return ScoredLoss(loss, detached(scores))
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    output_mask(outputs)
    hidden, autocast = autocast_hidden(hidden)
    check_head_inputs(hidden, weight, targets, bias, same_dtype=not autocast)
    check_target_range(targets, weight.shape[0])
    check_finite(hidden)
    backend = choose_backend("linear_token_loss", backend, hidden.device, hidden.dtype)
    workspace_bytes = workspace_of(workspace_bytes, hidden.device)
    tensors = (hidden, weight, bias)
    constants = [None if tensor is None else tensor.detach() for tensor in tensors]
    if not torch.is_grad_enabled():
        tensors = constants
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(*constants[1:], transform, gemm_dtype(hidden), backend, workspace_bytes)
        sweep = _TokenLossSweep(head, hidden.shape[0], token_loss, outputs, group_sizes, skip_zero_rows)
        loss, statistics = _LinearTokenLoss.apply(*tensors, targets.long(), sweep)
    return ScoredLoss(loss, token_scores(statistics, outputs))
