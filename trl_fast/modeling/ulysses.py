"""Shares the tokens of each row among processes (Ulysses sequence parallelism, arXiv 2309.14509).

A packed row of T tokens is cut into as many equal parts as there are processes, whatever sequence that cuts.
All layers but attention see a process's own tokens. For attention the processes exchange tokens for heads: each has
then all tokens of its share of the heads, and attends within the trees of the whole row as one process does; what
attention gives is exchanged back. Before the head the hidden states of scored tokens are dealt once more, whole trees
to a process, so that what a loss compares (the two completions of a pair) stands together. The scores are told to all.

All processes of a group get the same batch, and the same scores and loss. A process's gradients are those of its own
tokens, times the number of processes: DDP, FSDP and ZeRO take the mean, and the sum is meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed
from transformers import PreTrainedModel

from trl_fast.ops import TokenScores
from trl_fast.ops.linear_token_loss import TokenLoss
from trl_fast.ops.named_gradients import AutogradContext

# The keyword that carries a group from the model's forward to its attention.
GROUP_KEYWORD = "sequence_group"


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """Holds the processes that share the tokens of each row; rank: the number of this one among them."""

    group: torch.distributed.ProcessGroup
    rank: int
    size: int

    def deal_tokens(self, inputs: Mapping[str, Any], lengths_keyword: str) -> dict[str, Any]:
        """Returns keywords of the model's forward for this process's part of a packed row.

        inputs: those of the whole row: input_ids and position_ids (1, T), and the trees' lengths. The row is filled
        up with a tree of first tokens, so that all parts are of one length.
        """
        found, part = dict(inputs), self.part_length(inputs["input_ids"].shape[1])
        trees = tuple(inputs[lengths_keyword])
        missing = part * self.size - inputs["input_ids"].shape[1]
        if missing:
            trees = (*trees, (missing,))
        own = slice(self.rank * part, (self.rank + 1) * part)
        for name in ("input_ids", "position_ids"):
            found[name] = torch.nn.functional.pad(inputs[name], (0, missing))[:, own]
        return {**found, lengths_keyword: trees, GROUP_KEYWORD: self}

    def part_length(self, row_length: int) -> int:
        """Returns the tokens of each process's part of a row."""
        return -(-row_length // self.size)

    def gather_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """Exchanges queries, keys or values (1, heads, T / P, D) of this process's tokens for (1, heads / P, T, D)."""
        heads = states.shape[1]
        if heads % self.size:
            # Fewer key-value heads than processes: each has a copy of the one that its query heads read.
            states = states.repeat_interleave(self.size // heads, dim=1)
        return _Exchange.apply(states, self.group, 1, 2)

    def own_heads(self, of_heads: torch.Tensor) -> torch.Tensor:
        """Returns what belongs to this process's share of the heads, of something that each head has (heads, ...)."""
        return of_heads.chunk(self.size)[self.rank]

    def scatter_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """Exchanges what attention gives, (1, T, heads / P, D), for (1, T / P, heads, D) of this process's tokens."""
        return _Exchange.apply(attended, self.group, 1, 2)


_ACTIVE: ContextVar[SequenceGroup | None] = ContextVar("sequence group", default=None)


def active_group() -> SequenceGroup | None:
    """Returns the processes with which this one shares the rows that are scored now; None: it has them alone."""
    return _ACTIVE.get()


@contextmanager
def sharing_rows(group: SequenceGroup | None) -> Iterator[None]:
    """Shares the rows that are scored within the context with the processes of a group, which score the same ones."""
    token = _ACTIVE.set(group)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def sharing_refusal(model: PreTrainedModel, processes: int) -> str | None:
    """Returns why the attention heads of a model cannot be dealt to so many processes; None if they can."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % processes:
        return (
            f"{type(model).__name__} has {heads} attention heads, which are not dealt evenly to {processes} processes"
        )
    if groups % processes and processes % groups:
        return (
            f"{type(model).__name__} has {groups} key-value heads, which are not dealt evenly to {processes} processes"
        )
    return None


class _ExchangeContext(AutogradContext, Protocol):
    """Names what the forward pass of an exchange leaves for the backward pass."""

    group: torch.distributed.ProcessGroup
    split: int
    joined: int


class _Exchange(torch.autograd.Function):
    """Sends each process its part of a tensor along one dimension, and joins what comes along another one."""

    @staticmethod
    def forward(
        ctx: _ExchangeContext, states: torch.Tensor, group: torch.distributed.ProcessGroup, split: int, joined: int
    ) -> torch.Tensor:
        ctx.group, ctx.split, ctx.joined = group, split, joined
        return _exchanged(states, group, split, joined)

    @staticmethod
    def backward(ctx: _ExchangeContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchanged(grad, ctx.group, ctx.joined, ctx.split), None, None, None


def _exchanged(states: torch.Tensor, group: torch.distributed.ProcessGroup, split: int, joined: int) -> torch.Tensor:
    sent = torch.stack(states.chunk(group.size(), split))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), joined)


# ---- the head


def deal_groups(sizes: Sequence[int], parts: int) -> list[int]:
    """Returns where each part begins among all rows, and their number at the end: whole groups, nearly even parts.

    sizes: rows of each group, in order. A part may be empty.
    """
    edges = [0, *accumulate(sizes)]
    total = edges[-1]
    bounds = [min(edges, key=lambda edge: abs(edge - part * total / parts)) for part in range(1, parts)]
    return [0, *bounds, total]


class DealtRows:
    """Deals the N scored rows of a batch to the processes of a group, whole groups of rows to each.

    positions (N,): of the hidden states that predict them, in the row of row_length tokens; group_sizes: rows that
    stay together, in order, None for each alone.
    """

    def __init__(
        self,
        sequence_group: SequenceGroup,
        positions: torch.Tensor,
        row_length: int,
        group_sizes: tuple[int, ...] | None,
    ) -> None:
        self._shared = sequence_group
        size, rank, part = sequence_group.size, sequence_group.rank, sequence_group.part_length(row_length)
        count = positions.shape[0]
        sizes = (1,) * count if group_sizes is None else group_sizes
        self.bounds = deal_groups(sizes, size)
        self.rows = slice(self.bounds[rank], self.bounds[rank + 1])
        edges = [0, *accumulate(sizes)]
        whole = [size for size, edge in zip(sizes, edges, strict=False) if self.rows.start <= edge < self.rows.stop]
        self.group_sizes = None if group_sizes is None else tuple(whole)
        holder = positions.cpu() // part
        reader = torch.bucketize(torch.arange(count), torch.tensor(self.bounds[1:-1], dtype=torch.int64), right=True)
        held = (holder == rank).nonzero().squeeze(1)
        self._local = (positions.cpu()[held] - rank * part).to(positions.device)
        self._sent = torch.bincount(reader[held], minlength=size).tolist()
        from_whom = holder[self.rows]
        self._received = torch.bincount(from_whom, minlength=size).tolist()
        # Rows come by the process that held them; each goes to its own place.
        self._order = torch.argsort(torch.argsort(from_whom, stable=True)).to(positions.device)

    def hidden(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states (R, H) of the rows dealt to this process, from its own tokens' (1, T / P, H)."""
        sent = states.flatten(0, 1)[self._local]
        return _ExchangeRows.apply(sent, self._shared.group, self._sent, self._received)[self._order]

    def token_loss(self, token_loss: TokenLoss | None) -> TokenLoss | None:
        """Returns a loss of all N rows as one of the rows dealt to this process."""
        if token_loss is None:
            return None
        return lambda scores, rows: token_loss(scores, rows + self.rows.start)

    def told_to_all(self, tokens: TokenScores, loss: torch.Tensor | None) -> tuple[TokenScores, torch.Tensor | None]:
        """Returns the scores (N,) and the loss (0-d) of all rows, from those of the rows dealt to this process."""
        shared = self._shared
        if loss is not None:
            total = loss.detach().clone()
            torch.distributed.all_reduce(total, group=shared.group)
            loss = total + shared.size * (loss - loss.detach())
        names = [field.name for field in fields(tokens) if getattr(tokens, field.name) is not None]
        own = torch.stack([getattr(tokens, name).to(tokens.logprobs.dtype) for name in names])
        every = _TellAll.apply(own, shared.group, tuple(self.bounds), shared.rank)
        found = dict(zip(names, every.unbind(), strict=True))
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"].detach() > 0.5
        for name in ("log_sum_sq_probs", "mean_logits"):
            if name in found:
                found[name] = found[name].detach()
        return TokenScores(**found), loss


class _RowsContext(AutogradContext, Protocol):
    """Names what the forward pass of an exchange of rows leaves for the backward pass."""

    group: torch.distributed.ProcessGroup
    sent: list[int]
    received: list[int]


class _ExchangeRows(torch.autograd.Function):
    """Sends each process so many of the rows (R, H), in order, and returns those that come, process by process."""

    @staticmethod
    def forward(
        ctx: _RowsContext,
        rows: torch.Tensor,
        group: torch.distributed.ProcessGroup,
        sent: list[int],
        received: list[int],
    ) -> torch.Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchanged_rows(rows, group, sent, received)

    @staticmethod
    def backward(ctx: _RowsContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _exchanged_rows(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _exchanged_rows(
    rows: torch.Tensor, group: torch.distributed.ProcessGroup, sent: list[int], received: list[int]
) -> torch.Tensor:
    found = rows.new_empty(sum(received), rows.shape[1])
    torch.distributed.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
    return found


class _TellContext(AutogradContext, Protocol):
    """Names what the forward pass leaves for the backward pass: which columns are this process's, of how many."""

    own: slice
    size: int


class _TellAll(torch.autograd.Function):
    """Joins the columns (K, R) of all processes to (K, N); the gradient of the own ones is times the processes."""

    @staticmethod
    def forward(
        ctx: _TellContext, own: torch.Tensor, group: torch.distributed.ProcessGroup, bounds: tuple[int, ...], rank: int
    ) -> torch.Tensor:
        ctx.own, ctx.size = slice(bounds[rank], bounds[rank + 1]), group.size()
        counts = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        widest = max(counts)
        padded = torch.nn.functional.pad(own, (0, widest - own.shape[1])).contiguous()
        every = own.new_empty(group.size() * own.shape[0], widest)
        if widest:
            torch.distributed.all_gather_into_tensor(every, padded, group=group)
        parts = every.view(group.size(), own.shape[0], widest)
        return torch.cat([part[:, :count] for part, count in zip(parts, counts, strict=True)], dim=1)

    @staticmethod
    def backward(ctx: _TellContext, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad[:, ctx.own] * ctx.size, None, None, None
