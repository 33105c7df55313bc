"""Holds what a process has of a head whose vocabulary is dealt to several processes, and merges what each has found.

Tensor parallelism gives each process consecutive columns of the vocabulary, and the hidden states of all rows. A
process sweeps its own columns. The states of its rows (row_statistics.py) are sums relative to the largest logit among
these columns; the processes exchange them, 56 bytes a row, and merge them into the state of the whole row, as a sweep
merges tiles (online softmax, Milakov and Gimelshein, arXiv 1805.02867). So all have the same statistics and the same
loss, bit for bit. The gradient of weight and bias stays where their columns are; that of the hidden states is the sum
of what all processes have found.

A target is counted from a process's first column: it is negative, or behind the last column, where another process has
it. The row kernels need no more to leave it out, and to find the largest logit before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed
from torch.distributed import distributed_c10d

from .row_statistics import BEFORE, SUM, SUM_SQ, SUM_X, TARGET, TOP, TOTAL


class VocabularyShard(NamedTuple):
    """Says which columns of a head's vocabulary a process has. In the place of a head that is whole stands None.

    first: the first of them; vocab_size: columns of the whole head; widest: columns of the process that has most, by
    which all processes cut their rows alike; group: name of the process group.
    """

    first: int
    vocab_size: int
    widest: int
    group: str

    def local(self, targets: torch.Tensor) -> torch.Tensor:
        """Returns targets (N,) int64, counted from this process's first column."""
        return targets - self.first

    def merged(self, state: torch.Tensor) -> torch.Tensor:
        """Returns the state (7, R) float64 of whole rows from that of this process's columns. Collective."""
        if not state.shape[1]:
            return state
        group = self._process_group()
        states = state.new_empty(group.size() * state.shape[0], state.shape[1])
        torch.distributed.all_gather_into_tensor(states, state.contiguous(), group=group)
        return merge_states(states.view(group.size(), *state.shape))

    def add_up(self, partial: torch.Tensor) -> None:
        """Puts the sum over the processes in the place of a contiguous tensor of any shape. Collective."""
        if partial.numel():
            torch.distributed.all_reduce(partial, group=self._process_group())

    def _process_group(self) -> torch.distributed.ProcessGroup:
        return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(self.group))


def merge_states(states: torch.Tensor) -> torch.Tensor:
    """Merges the states (P, 7, R) float64 of the same rows over P parts of their columns, in any order, to (7, R).

    Of each row at most one part has the target; its columns before the target are those of the parts in front too.
    """
    merged = torch.zeros_like(states[0])
    top = states[:, TOP].amax(dim=0)
    # While everything is -inf, sums are 0 and relative to 0: -inf - -inf would be NaN.
    anchor = torch.where(top == float("-inf"), 0.0, top)
    shift = torch.where(states[:, TOP] == float("-inf"), 0.0, states[:, TOP] - anchor)
    factor = shift.exp()
    merged[TOP] = top
    merged[SUM] = (factor * states[:, SUM]).sum(dim=0)
    # A part that is infinitely far below has a factor of 0 and nothing to add.
    moved = torch.where(factor == 0, 0.0, states[:, SUM_X] + shift * states[:, SUM])
    merged[SUM_X] = (factor * moved).sum(dim=0)
    merged[SUM_SQ] = (factor.square() * states[:, SUM_SQ]).sum(dim=0)
    merged[TOTAL] = states[:, TOTAL].sum(dim=0)
    owner = (~states[:, TARGET].isnan()).to(torch.uint8).argmax(dim=0)
    merged[TARGET] = states[:, TARGET].gather(0, owner[None]).squeeze(0)
    merged[BEFORE] = states[:, BEFORE].amax(dim=0)
    return merged
