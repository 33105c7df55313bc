"""Orders the segments of a row of trees for a layer that carries a state: which ones run together, from which states.

Such a layer (linear attention, a short convolution, Mamba) goes from token to token. A segment that continues another
one starts from the state behind it, so parents run before what continues them. Segments of similar length run
together, as the rows of a batch; how each kind is made equally long follows from what its state is needed for:

- A segment that nothing continues: pads on its right, which no token sees.
- One that is continued and starts a sequence: pads on its left. A state is zero there, and pads write nothing into it.
- One that is continued and continues another: pads would write on either side. All segments of a batch run up to the
  length of its shortest; what a longer one has left over runs once more in front of each segment that continues it.

Where pads on the left write too, all states are made in the third way. A layer that cannot go on from a state computes
each sequence as a whole: everything is left over.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.segments import Segment, TreeLengths, segments_of
from trl_fast.ops.device import DeviceFacts, device_facts

# What one more batch costs, in tokens that could be computed instead, by the type of a device. A GPU's is an estimate:
# its host launches some 150 kernels for a layer's forward and backward in 1 ms, the time of 500 tokens or more.
BATCH_COSTS = {"cpu": 64}
GPU_BATCH_COST = 512
# The narrowest batch that starts from states: layers take a single token for a step of generation, without gradients.
MIN_CONTINUED_TOKENS = 2


class States(enum.Enum):
    """Names how a layer comes to the states from which others go on."""

    PADDED_LEFT = "pads on the left write nothing"
    CUT = "pads write"
    NONE = "it cannot go on from a state"


@dataclass(frozen=True)
class RunBatch:
    """Holds B runs of tokens that a layer computes together, at most L tokens each.

    - `tokens` (B · L,) int64: their places in the row; pads have a place too, the row's first.
    - `shape`: (B, L).
    - `mask` (B, L) bool: False at pads on the left; None where there are none.
    - `parents` (B,) int64: the numbers of the states that they start from; None: from zero.
    - `keeps_states`: whether others start from the states behind them, which get the next B numbers.
    """

    tokens: torch.Tensor
    shape: tuple[int, int]
    mask: torch.Tensor | None
    parents: torch.Tensor | None
    keeps_states: bool


@dataclass(frozen=True)
class RowRuns:
    """Holds the batches of a row of T tokens, in the order in which they run.

    `places` (T,) int64: where a token's output stands among the flattened outputs of all batches.
    """

    batches: tuple[RunBatch, ...]
    places: torch.Tensor

    @property
    def computed_tokens(self) -> int:
        """Returns how many tokens the batches have, with pads and with what runs more than once."""
        return sum(batch.shape[0] * batch.shape[1] for batch in self.batches)


# Tokens of the row, as pieces from start to end.
_Pieces: TypeAlias = tuple[tuple[int, int], ...]


class _Run(NamedTuple):
    """Holds the tokens of a segment and of what was left over before it, and the number of the state before these."""

    segment: int
    pieces: _Pieces
    start: int | None

    @property
    def length(self) -> int:
        return sum(end - start for start, end in self.pieces)


def row_runs(trees: tuple[TreeLengths, ...], device: torch.device, kind: States = States.PADDED_LEFT) -> RowRuns:
    """Returns the batches of a row of trees for layers with a state, on a device; the host does not wait for it."""
    return _row_runs(trees, device, device_facts(device), kind)


@functools.lru_cache(maxsize=16)
def _row_runs(trees: tuple[TreeLengths, ...], device: torch.device, facts: DeviceFacts, kind: States) -> RowRuns:
    """Returns the batches of a row.

    facts: of the device; a simulation must not be given the tensors of another one.
    """
    runs = _Planner(kind, BATCH_COSTS.get(facts.kind, GPU_BATCH_COST)).plan(segments_of(trees))
    return RowRuns(tuple(_on_device(batch, device) for batch in runs.batches), copy_to_device(runs.places, device))


@dataclass
class _Planner:
    """Collects the batches of a row."""

    kind: States
    batch_cost: int
    batches: list[RunBatch] = field(default_factory=list)
    # By segment: the state from which what continues it goes on, and the tokens between that state and its end.
    states: dict[int | None, int | None] = field(default_factory=lambda: {None: None})
    left_over: dict[int | None, _Pieces] = field(default_factory=lambda: {None: ()})
    num_states: int = 0
    # Tokens of the row, batch by batch, and where their outputs stand.
    tokens: list[torch.Tensor] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    num_outputs: int = 0

    def plan(self, segments: tuple[Segment, ...]) -> RowRuns:
        """Returns the batches of a row's segments, those whose states are needed first."""
        continued = [number for number, segment in enumerate(segments) if segment.is_continued]
        for depth in sorted({segments[number].depth for number in continued}):
            level = [self._run(number, segments[number]) for number in continued if segments[number].depth == depth]
            self._add_continued(level)
        ends = [
            self._run(number, segment)
            for number, segment in enumerate(segments)
            if segment.length and not segment.is_continued
        ]
        for is_first in (True, False):
            for bucket in self._buckets([run for run in ends if (run.start is None) == is_first]):
                self._add(bucket, keeps_states=False)
        places = torch.zeros(segments[-1].end if segments else 0, dtype=torch.int64)
        for tokens, outputs in zip(self.tokens, self.outputs, strict=True):
            places[tokens] = outputs
        return RowRuns(tuple(self.batches), places)

    def _buckets(self, runs: list[_Run]) -> Iterator[list[_Run]]:
        return buckets(runs, self.batch_cost)

    def _run(self, number: int, segment: Segment) -> _Run:
        """Returns the run of a segment, whose parent has its state and what it left over."""
        pieces = (*self.left_over[segment.parent], *([(segment.start, segment.end)] if segment.length else []))
        return _Run(number, pieces, self.states[segment.parent])

    def _add_continued(self, level: list[_Run]) -> None:
        """Adds the batches of segments of one depth that are continued."""
        first, others = ([run for run in level if (run.start is None) == is_first] for is_first in (True, False))
        if self.kind is States.PADDED_LEFT:
            for bucket in self._buckets([run for run in first if run.length]):
                self._keep_states(bucket, [()] * len(bucket))
                self._add(bucket, keeps_states=True)
        elif self.kind is States.CUT:
            self._add_cut(first)
        self._add_cut(others)
        for run in level:
            # Of no state, or too short for a batch of its own: all of it runs in front of what continues it.
            self.states.setdefault(run.segment, run.start)
            self.left_over.setdefault(run.segment, run.pieces)

    def _add_cut(self, runs: list[_Run]) -> None:
        """Adds batches of runs that are as long as their shortest one."""
        for bucket in self._buckets([run for run in runs if run.length >= MIN_CONTINUED_TOKENS]):
            width = min(run.length for run in bucket)
            split = [_split(run.pieces, width) for run in bucket]
            self._keep_states(bucket, [rest for _, rest in split])
            cut = [run._replace(pieces=first) for run, (first, _) in zip(bucket, split, strict=True)]
            self._add(cut, keeps_states=True)

    def _keep_states(self, runs: list[_Run], left_over: list[_Pieces]) -> None:
        for run, rest in zip(runs, left_over, strict=True):
            self.states[run.segment], self.left_over[run.segment] = self.num_states, rest
            self.num_states += 1

    def _add(self, runs: list[_Run], *, keeps_states: bool) -> None:
        """Adds a batch, with pads on the left if its states are kept, else on the right."""
        lengths = torch.tensor([run.length for run in runs])
        parents = None if runs[0].start is None else torch.tensor([run.start for run in runs])
        width = max(int(lengths.max()), 1 if parents is None else MIN_CONTINUED_TOKENS)
        columns = torch.arange(width)
        mask = columns >= (width - lengths)[:, None] if keeps_states else columns < lengths[:, None]
        row = torch.cat([torch.arange(start, end) for run in runs for start, end in run.pieces])
        tokens = torch.zeros(len(runs), width, dtype=torch.int64)
        tokens[mask] = row
        self.tokens.append(row)
        self.outputs.append(self.num_outputs + mask.flatten().nonzero().squeeze(1))
        self.num_outputs += mask.numel()
        masks = keeps_states and not mask.all()
        shape = (len(runs), width)
        self.batches.append(RunBatch(tokens.flatten(), shape, mask if masks else None, parents, keeps_states))


def _split(pieces: _Pieces, width: int) -> tuple[_Pieces, _Pieces]:
    """Returns the first `width` tokens of a run's pieces, and the others."""
    before, after = [], []
    for (start, end), total in zip(pieces, accumulate((end - start for start, end in pieces)), strict=True):
        cut = min(max(end - (total - width), start), end)
        before += [(start, cut)] if start < cut else []
        after += [(cut, end)] if cut < end else []
    return tuple(before), tuple(after)


def buckets(runs: list[_Run], batch_cost: int) -> Iterator[list[_Run]]:
    """Yields the runs in groups of similar length: those for which pads and batches together cost least.

    A batch of n runs costs n times its longest run, and `batch_cost`.
    """
    by_length: dict[int, list[_Run]] = {}
    for run in sorted(runs, key=lambda run: -run.length):
        by_length.setdefault(run.length, []).append(run)
    lengths = [*by_length]
    counts = [0, *accumulate(len(group) for group in by_length.values())]
    # The least cost of the longest lengths, so many, and where their last batch begins.
    best = [(0, 0)]
    for end in range(1, len(lengths) + 1):
        best.append(
            min(
                (best[first][0] + (counts[end] - counts[first]) * lengths[first] + batch_cost, first)
                for first in range(end)
            )
        )
    ends = []
    end = len(lengths)
    while end:
        ends.append((best[end][1], end))
        end = best[end][1]
    for first, end in reversed(ends):
        yield [run for length in lengths[first:end] for run in by_length[length]]


def _on_device(batch: RunBatch, device: torch.device) -> RunBatch:
    mask = None if batch.mask is None else copy_to_device(batch.mask, device)
    parents = None if batch.parents is None else copy_to_device(batch.parents, device)
    return RunBatch(copy_to_device(batch.tokens, device), batch.shape, mask, parents, batch.keeps_states)
