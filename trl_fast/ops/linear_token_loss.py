"""Computes any loss that is a sum over tokens from hidden states and the head's weight.

How much a row of such a loss weighs is known as soon as the row is scored, so its gradient is computed in the
forward pass, while the row's logits are still there: three passes over N·V·H, two with a frozen head, and none
recomputed. GRPO, PPO, weighted likelihood and DFT (arXiv 2508.05629) are of this kind.

Sequence losses such as DPO weigh a row by all that it belongs with: `group_sizes` says what that is. Groups are scored
together, and their gradient computed while their logits are there; only the rows of a group that does not fit the
workspace are computed again, a fourth pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from .backends import choose_backend
from .device import device_facts
from .head.autograd import differentiable_scores, planned_head
from .head.gradients import HeadGradients, Needs
from .head.kept_logits import KeptLogits
from .head.logit_transform import LogitTransform
from .head.plan import BLOCKS, GROUPS, HeadOptions
from .head.row_statistics import LSE_ROW, NUM_STATISTICS, output_mask, row_coefficients
from .head.sweep import empty_kept_logits, score_rows
from .head.tiled_head import TiledHead
from .head.transient_scores import transient_scores
from .head.transient_weight import TransientWeight
from .head.vocabulary_shard import VocabularyShard
from .memory_pool import scaled
from .named_gradients import AutogradContext, first_derivative, gradients_of
from .token_scores import TokenScores, token_scores
from .validation import check_head_call

TokenLoss = Callable[[TokenScores, torch.Tensor], torch.Tensor]


class ScoredLoss(NamedTuple):
    """Holds a loss, 0-d and differentiable, and the scores of all N tokens, without gradient."""

    loss: torch.Tensor
    scores: TokenScores


def _summed(loss: object) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ValueError(f"token_loss: expected a summed loss, a 0-d tensor, got {got}")
    return loss


class _LossParameters:
    """Sums the gradients of what `token_loss` has besides the scores: a temperature that trains, say.

    They are found by following the graph of the loss to its leaves, and reach autograd as a term that is 0.
    """

    def __init__(self) -> None:
        self._sums: dict[torch.Tensor, torch.Tensor] = {}

    def gradients(self, loss: torch.Tensor, scores: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """Returns the derivatives of a block's loss (0-d) by its scores, (R,) each, and adds those by parameters."""
        parameters = [leaf for leaf in _leaves(loss) if not any(leaf is score for score in scores)]
        # What the parameters have gone through is part of the next block's graph too.
        found = torch.autograd.grad(loss, [*scores, *parameters], allow_unused=True, retain_graph=bool(parameters))
        for parameter, gradient in zip(parameters, found[len(scores) :], strict=True):
            if gradient is not None:
                before = self._sums.get(parameter)
                self._sums[parameter] = gradient if before is None else before + gradient
        return list(found[: len(scores)])

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss (0-d), with the gradients of the parameters."""
        for parameter, gradient in self._sums.items():
            term = (parameter * gradient).sum().to(loss.dtype)
            loss = loss + (term - term.detach()).nan_to_num(0.0)
        return loss


def _leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors that get a gradient from a loss (0-d)."""
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def _block_loss(
    token_loss: TokenLoss,
    statistics: torch.Tensor,
    rows: torch.Tensor,
    outputs: tuple[str, ...],
    vocab_size: int,
    parameters: _LossParameters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the loss (0-d) of a row block and its coefficients (4, R), from its derivatives by the scores."""
    scores = token_scores(statistics, outputs)
    leaves = [scores.logprobs.detach().requires_grad_()]
    scores = replace(scores, logprobs=leaves[0])
    if scores.entropy is not None:
        leaves.append(scores.entropy.detach().requires_grad_())
        scores = replace(scores, entropy=leaves[1])
    with torch.enable_grad():
        loss = _summed(token_loss(scores, rows))
    grads: list[torch.Tensor | None] = [None, None]
    if loss.requires_grad:
        found = parameters.gradients(loss, leaves)
        grads[: len(found)] = found
    coefficients = row_coefficients(statistics, vocab_size, grad_logprobs=grads[0], grad_entropy=grads[1])
    return loss.detach(), coefficients


class _TokenLossSweep:
    """Scores row blocks, asks `token_loss` for their coefficients, and adds up the loss and the head's gradients."""

    def __init__(
        self,
        head: TiledHead,
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
        dtype, device = head.plan.sum_dtype, head.weight.device
        self.parameters = _LossParameters()
        self.loss = torch.zeros((), dtype=dtype, device=device)
        self.statistics = torch.empty(NUM_STATISTICS, num_rows, dtype=dtype, device=device)

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, rows: slice, keep: KeptLogits | None) -> None:
        """Writes the statistics of rows that begin with a tile. keep: takes the logits of the first of them."""
        outputs = output_mask(self.outputs)
        self.statistics[:, rows] = score_rows(self.head, hidden[rows], targets[rows], outputs, keep=keep)

    def add_loss(self, rows: slice) -> torch.Tensor:
        """Adds the loss of rows that are scored; returns their coefficients (4, R)."""
        numbers = torch.arange(rows.start, rows.stop, device=self.statistics.device)
        given = (self.statistics[:, rows], numbers, self.outputs, self.head.vocab_size, self.parameters)
        loss, coefficients = _block_loss(self.token_loss, *given)
        self.loss += loss
        return coefficients

    def differentiate(self, hidden: torch.Tensor, targets: torch.Tensor, gradients: HeadGradients) -> None:
        """Scores all rows (N, H), block by block, and adds their gradients while the logits are there.

        Rows are scored in whole tiles: of the tile in which a block of groups ends, the next block has the logits.
        """
        plan, num_rows = self.head.plan, hidden.shape[0]
        logits = empty_kept_logits(self.head)
        # Logits are kept of the rows from `first` to `stop`; all rows before `stop` are scored.
        first = stop = 0
        for rows in self._blocks(num_rows):
            start = rows.start if rows.start <= stop else plan.tile_start(rows.start)
            logits.move(slice(start - first, max(stop, start) - first))
            first, scored = start, max(stop, start)
            end = max(scored, min(num_rows, plan.tile_stop(rows.stop)))
            room = first + logits.num_rows
            # A tile is kept as a whole or not at all.
            stop = end if end <= room else max(scored, plan.tile_start(room))
            self.score(hidden, targets, slice(scored, end), logits.part(slice(scored - first, stop - first)))
            kept = logits.part(slice(rows.start - first, max(rows.start, min(rows.stop, stop)) - first))
            coefficients = self.add_loss(rows)
            given = (hidden[rows], targets[rows], self.statistics[LSE_ROW, rows], coefficients, kept)
            last = rows.stop == num_rows
            gradients.add(rows, *given, consume=True, skip_zero_rows=self.skip_zero_rows, last=last)

    def _blocks(self, num_rows: int) -> list[slice]:
        plan = self.head.plan
        return plan.blocks(num_rows) if self.group_sizes is None else plan.group_blocks(self.group_sizes)


class _Context(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass beside the gradients of hidden, weight and bias."""

    dtypes: list[torch.dtype]


class _LinearTokenLoss(torch.autograd.Function):
    """Computes the loss with its gradients, and gives them to autograd.

    It is no torch.library op, because those take no functions; torch.compile breaks its graph here.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        sweep: _TokenLossSweep,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs = Needs(*ctx.needs_input_grad[:3])
        gradients = HeadGradients(sweep.head, hidden.shape[0], needs, waiting=True)
        product = hidden.to(sweep.head.plan.product_dtype)
        if any(needs):
            sweep.differentiate(product, targets, gradients)
        else:
            rows = slice(0, hidden.shape[0])
            sweep.score(product, targets, rows, keep=None)
            sweep.add_loss(rows)
        # Without a bias its dtype is not looked at.
        ctx.dtypes = [hidden.dtype, weight.dtype, (weight if bias is None else bias).dtype]
        ctx.save_for_backward(*gradients.results(ctx.dtypes[0], ctx.dtypes[2]))
        ctx.mark_non_differentiable(sweep.statistics)
        return sweep.loss, sweep.statistics

    @staticmethod
    @first_derivative("linear_token_loss")
    def backward(ctx: _Context, grad_loss: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = zip(Needs._fields, ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        gradients = {name: scaled(one, grad_loss, dtype) for name, one, dtype, needed in saved if needed}
        return gradients_of(_LinearTokenLoss.forward, **gradients)


def _head_trains(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _check_groups(group_sizes: Sequence[int] | None, num_rows: int) -> None:
    if group_sizes is not None and (min(group_sizes, default=0) < 0 or sum(group_sizes) != num_rows):
        raise ValueError(
            f"group_sizes: expected numbers of rows that sum to the {num_rows} of hidden, got {list(group_sizes)[:8]} "
            f"with the sum {sum(group_sizes)}"
        )


# torch.compiler.disable does the same, and imports the compiler with this module: two seconds.
@torch._disable_dynamo
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
    shard: VocabularyShard | None = None,
) -> ScoredLoss:
    """Computes a sum over tokens of any differentiable function of their log-probability and entropy.

    Rows to which `token_loss` gives no gradient (masked, clipped, zero advantage) take no part in the products of the
    gradient.

    Args:
        hidden, weight, targets, bias, temperature, softcap, logit_scale, workspace_bytes, backend, shard: as in
            linear_logprob. Of a shard, token_loss has to give the same in all processes.
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
    transform = LogitTransform.of(temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    given = (hidden, weight, targets, bias, transform, outputs, HeadOptions(backend, workspace_bytes))
    return token_loss_of_head(*given, token_loss, group_sizes, skip_zero_rows, shard)


@torch._disable_dynamo
def token_loss_of_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: tuple[str, ...],
    options: HeadOptions,
    token_loss: TokenLoss,
    group_sizes: Sequence[int] | None = None,
    skip_zero_rows: bool | None = None,
    shard: VocabularyShard | None = None,
    source: TransientWeight | None = None,
) -> ScoredLoss:
    """Computes what linear_token_loss does, with the logits' transform and the user's settings as values.

    hidden: (N, H) float32|bfloat16|float16; weight: (V, H); targets: (N,) integer; bias: (V,) or None; shard: which
    columns the V are. The gradient of the head is the one that the options ask for. source: how the weight is made
    again in backward, where it is not kept. The loss is then of all rows at once, and its gradient computed in
    backward.
    """
    _check_groups(group_sizes, hidden.shape[0])
    mask = output_mask(outputs)
    frozen_groups = group_sizes is not None and not _head_trains(weight, bias)
    if options.head_grad != "exact" or source is not None or frozen_groups:
        # d logprob / d hidden needs no loss, so with a frozen head no group has to fit anywhere.
        given = (hidden, weight, targets, bias, transform, mask, options)
        if source is None:
            found = differentiable_scores("linear_logprob", *given, shard)
        else:
            found = transient_scores("linear_logprob", *given, source)
        scores = token_scores(found.statistics, outputs, logprobs=found.logprobs, entropy=found.entropy)
        loss = _summed(token_loss(scores, torch.arange(hidden.shape[0], device=hidden.device)))
        return ScoredLoss(loss, scores.detach())
    facts = device_facts(hidden.device)
    workspace_bytes = options.workspace_on(hidden.device, facts, shard)
    hidden = check_head_call(hidden, weight, targets, bias, shard)
    backend = choose_backend("linear_token_loss", options.backend, facts, hidden.dtype)
    constants = (hidden.detach(), weight.detach(), None if bias is None else bias.detach())
    tensors = (hidden, weight, bias) if torch.is_grad_enabled() else constants
    with torch.autocast(hidden.device.type, enabled=False):
        keep = BLOCKS if group_sizes is None else GROUPS
        head = planned_head(hidden, *constants[1:], transform, keep, workspace_bytes, backend, shard)
        sweep = _TokenLossSweep(head, hidden.shape[0], token_loss, outputs, group_sizes, skip_zero_rows)
        loss, statistics = _LinearTokenLoss.apply(*tensors, targets.long(), sweep)
        if torch.is_grad_enabled():
            loss = sweep.parameters.added_to(loss)
    return ScoredLoss(loss, token_scores(statistics, outputs))
