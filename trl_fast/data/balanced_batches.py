"""Deals the rows of each optimizer step to processes and micro-batches, so that none waits long for another.

A process that has the longest rows lets all others wait. The rows of a step are known before it begins, and so is what
each of them costs, so every process computes the same deal without asking another. The rows of a step, and the number
of rows in a micro-batch, stay what they are: only who computes which row changes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import BatchSampler

from .layer_sizes import experts_per_token, head_width, key_value_heads, mlp_width


class TreeSizes(NamedTuple):
    """Holds what the cost of R token trees depends on, each (R,) float64.

    tokens: those that the model runs on. pairs: pairs of a query and a key that attention computes. scored: tokens
    that the language-model head scores.
    """

    tokens: np.ndarray
    pairs: np.ndarray
    scored: np.ndarray


def tree_sizes(prompts: np.ndarray, branches: np.ndarray, *, shares_prompts: bool) -> TreeSizes:
    """Returns the sizes of trees of a prompt with P tokens and branches with B: P + ΣB and (P² + Σ(B² + 2·B·P)) / 2.

    Args:
        prompts: (R,), the tokens of each tree's prompt.
        branches: (R, K), the tokens of each of its branches.
        shares_prompts: whether a prompt is computed once; otherwise it is part of each of its branches.
    """
    scored = branches.sum(axis=1, dtype=np.float64)
    if not shares_prompts:
        prompts, branches = np.zeros_like(prompts), branches + prompts[:, None]
    own, below = prompts.astype(np.float64), branches.astype(np.float64)
    pairs = (own**2 + (below**2 + 2 * below * own[:, None]).sum(axis=1)) / 2
    return TreeSizes(own + below.sum(axis=1), pairs, scored)


@dataclass(frozen=True)
class CostModel:
    """Holds the floating-point operations of a forward pass: a token's, a scored token's, a query-key pair's.

    Backward passes take a multiple of them, which changes no comparison.
    """

    token: float
    pair: float
    scored: float = 0.0

    @classmethod
    def of_config(cls, config: Any, *, has_head: bool) -> CostModel:
        """Returns the cost model of decoder layers, from the shape that a transformers configuration describes.

        Every layer counts as full attention and a gated MLP; of experts those count that a token is sent to.

        Args:
            config: the configuration of the text model.
            has_head: whether scored tokens meet a language-model head.
        """
        hidden, layers = config.hidden_size, config.num_hidden_layers
        heads = config.num_attention_heads
        head_size = head_width(config) or hidden // heads
        kv_heads = key_value_heads(config) or heads
        mlp = mlp_width(config) or 4 * hidden
        experts = experts_per_token(config) or 1
        mlp = experts * (getattr(config, "moe_intermediate_size", None) or mlp)
        weights = hidden * (2 * heads * head_size + 2 * kv_heads * head_size + 3 * mlp)
        return cls(
            token=2.0 * layers * weights,
            pair=4.0 * layers * heads * head_size,
            scored=2.0 * hidden * config.vocab_size if has_head else 0.0,
        )

    def costs(self, sizes: TreeSizes) -> np.ndarray:
        """Computes the cost of each tree, (R,) int64, in tokens that meet neither attention nor head.

        Whole numbers add up to the same sum on every machine, so that all processes come to the same deal.
        """
        operations = self.token * sizes.tokens + self.pair * sizes.pairs + self.scored * sizes.scored
        return np.rint(operations / self.token).astype(np.int64)


class StepTime(NamedTuple):
    """Holds the cost of a step for the process that ends last.

    waits_often: where processes wait for each other in every micro-batch (FSDP, ZeRO-3). waits_once: where they wait
    at the end of the step (DDP).
    """

    waits_often: int
    waits_once: int


def step_time(costs: np.ndarray) -> StepTime:
    """Returns what a deal takes: costs (A, W) of each micro-batch of each process."""
    return StepTime(int(costs.max(axis=1).sum()), int(costs.sum(axis=0).max()))


def deal(costs: np.ndarray, num_ranks: int, num_rows: int, *, across_micro_batches: bool) -> np.ndarray:
    """Returns the order of a step's rows in which each micro-batch of each process is about as dear as the others.

    The rows, longest first, go to the cheapest micro-batch that has room. Micro-batches that cost about the same are
    computed at the same time, the dearest first, each by the process that has had the least to do so far. Where this
    is no better than the rows' own order, as may be with few rows, they keep that.

    Args:
        costs: (A·W·B,) int64, of the step's rows as they come: B rows for each of W processes, for each of A
            micro-batches.
        num_ranks: W.
        num_rows: B.
        across_micro_batches: whether a row may change the micro-batch, besides the process.

    Returns:
        The places of the rows, (A·W·B,) int64: in the form (A, W, B) those of each micro-batch of each process.
    """
    steps = len(costs) // (num_ranks * num_rows)
    kept = np.arange(len(costs)).reshape(steps, num_ranks, num_rows)
    groups = [kept.ravel()] if across_micro_batches else [*kept.reshape(steps, num_ranks * num_rows)]
    bins = [found for group in groups for found in _filled(group, costs, num_rows)]
    dealt = np.empty_like(kept)
    totals = np.zeros(num_ranks, dtype=np.int64)
    for step, together in enumerate(_parts(bins, num_ranks)):
        for rows, rank in zip(together, totals.argsort(kind="stable"), strict=True):
            dealt[step, rank] = rows
        totals += costs[dealt[step]].sum(axis=1)
    before, after = (step_time(costs[places].sum(axis=2)) for places in (kept, dealt))
    is_better = after != before and all(new <= old for new, old in zip(after, before, strict=True))
    return (dealt if is_better else kept).ravel()


def _parts(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields consecutive values in lists of `size`; the last one may be shorter."""
    values = iter(values)
    while part := [*islice(values, size)]:
        yield part


def _filled(places: np.ndarray, costs: np.ndarray, num_rows: int) -> list[list[int]]:
    """Returns the places in lists of `num_rows`, the dearest list first; longest first into the cheapest list."""
    bins: list[list[int]] = [[] for _ in range(len(places) // num_rows)]
    loads = [(0, number) for number in range(len(bins))]  # those with room; of equal ones the first
    full = []
    for place in places[np.argsort(-costs[places], kind="stable")]:
        load, number = loads[0]
        bins[number].append(int(place))
        load += costs[place]
        if len(bins[number]) < num_rows:
            heapq.heapreplace(loads, (load, number))
        else:
            heapq.heappop(loads)
            full.append((-load, number))
    return [sorted(bins[number]) for _, number in sorted(full)]


class BalancedBatches(BatchSampler):
    """Yields the batches of a sampler, with the rows of each optimizer step dealt by their cost; see `deal`.

    It stands where accelerate deals batches to processes in turn, and gives them to it in the order that makes the
    deal. Rows of an epoch's first batches that fill up its last ones are those that accelerate would take.

    Args:
        batches: the batches of all processes in turn, or with `split` those that processes divide among them.
        costs: (R,) int64, of the dataset's rows.
        num_ranks: processes.
        accumulation_steps: micro-batches of a step.
        across_micro_batches: whether a row may change the micro-batch, besides the process.
        fills: whether the last batches are filled up.
        split: whether a batch is for all processes together.
    """

    def __init__(
        self,
        batches: BatchSampler,
        costs: np.ndarray,
        num_ranks: int,
        accumulation_steps: int,
        *,
        across_micro_batches: bool,
        fills: bool = True,
        split: bool = False,
    ) -> None:
        self.batches = batches
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last
        self._costs, self._num_ranks = costs, num_ranks
        self._num_rows = self.batch_size // num_ranks if split else self.batch_size
        self._accumulation_steps = accumulation_steps
        self._across = across_micro_batches
        self._fills = fills and not self.drop_last

    @property
    def sampler(self) -> Any:
        """Returns what orders the rows; accelerate tells it the epoch."""
        return self.batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batches.sampler = sampler

    @property
    def _rows_at_a_time(self) -> int:
        """Returns the rows that all processes compute in a micro-batch."""
        return self._num_ranks * self._num_rows

    def __iter__(self) -> Iterator[list[int]]:
        together = self._rows_at_a_time
        rows = (row for batch in self.batches for row in batch)
        first: list[int] = []
        for step in _parts(rows, together * self._accumulation_steps):
            first = first or step[:together]
            missing = -len(step) % together if self._fills else 0
            yield from self._batches_of([*step, *islice(cycle(first), missing)])

    def _batches_of(self, rows: list[int]) -> Iterator[list[int]]:
        """Yields the batches of a step; rows beside whole micro-batches of all processes stay as they are."""
        whole = len(rows) - len(rows) % self._rows_at_a_time
        order = deal(self._costs[rows[:whole]], self._num_ranks, self._num_rows, across_micro_batches=self._across)
        yield from _parts([*(rows[place] for place in order), *rows[whole:]], self.batch_size)

    def __len__(self) -> int:
        count = len(self.batches)
        rows_of_all = self._rows_at_a_time // self.batch_size
        return -(-count // rows_of_all) * rows_of_all if self._fills else count
