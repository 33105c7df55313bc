"""Sweeps over the head's tiles: rows are scored, and the gradients of hidden states, weight and bias are summed.

What of a workspace waits for the gradient is in kept_logits.py; the rows whose gradient is taken, in row_blocks.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ..device import some_tiles
from ..matmul import add_mm, mm_into
from ..memory_pool import as_dtype, pooled_empty
from ..slices import spans
from ..token_scores import LSE_LOW_ROW, LSE_ROW
from .fused_kernel import score_rows_fused
from .kept_logits import KeptLogits
from .plan import Head
from .row_blocks import RowBlock
from .row_kernels import SUM, TARGET, TOP, finish_scores, rescale, with_low_part


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient, for a tensor of `dtype`, that still waits for the factor of its loss.

    float16 ends at 6e-8: what a mean over many tokens leaves of a probability is below that until a loss scale
    multiplies it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def score_rows(
    head: Head,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    outputs: int,
    state: torch.Tensor,
    *,
    keep: KeptLogits | None = None,
    unit_gradient: UnitGradient | None = None,
) -> None:
    """Adds all columns to the state (7, N) of all rows.

    hidden: (N, H) in the product's dtype; keep: takes the logits of the first rows, as many as it has; unit_gradient:
    goes through the same tiles.
    """
    if head.fused is not None:
        logit_factor = head.transform.scale * head.transform.inv_temperature
        given = (hidden, head.weight_tile(slice(None)), targets, head.bias, logit_factor, outputs, state, keep)
        return score_rows_fused(*given, head.fused, head.workspace_bytes // 4)
    num_rows = hidden.shape[0]
    kept = 0 if keep is None else keep.num_rows
    height, width = head.tiling(num_rows, keep, gradients=unit_gradient is not None)
    beyond = some_tiles(spans(num_rows - kept, height), hidden.device)
    parts = [*some_tiles(spans(kept, height), hidden.device), *(slice(kept + s.start, kept + s.stop) for s in beyond)]
    passing = num_rows if keep is None or keep.packed else num_rows - kept
    scratch = head.scratch(min(height, passing), width, head.logits_dtype)
    gives_narrow = unit_gradient is not None and head.narrow_gradients
    room_for_weights = head.scratch(height, width, head.dtype) if gives_narrow else scratch
    for columns in some_tiles(spans(head.vocab_size, width), hidden.device):
        weight = head.weight_tile(columns)
        for rows in parts:
            corner = (slice(rows.stop - rows.start), slice(columns.stop - columns.start))
            room = keep.tile(columns).part(rows) if rows.start < kept else None
            packed = room if room is not None and keep.packed else None
            tile = scratch[corner] if room is None or keep.packed else room.values
            mm_into(tile, hidden[rows], weight.t())
            if unit_gradient is None:
                head.score(tile, targets[rows], columns, outputs, state[:, rows], packed)
                continue
            top = state[TOP, rows].clone()
            weights = head.weigh(tile, targets[rows], columns, outputs, state[:, rows], room_for_weights[corner])
            unit_gradient.add(rows, weights, weight, rescale(top, state[TOP, rows]))


class UnitGradient:
    """d logprob / d hidden of every row, (N, H), in the sweep that scores it.

    It is W[target] - sum_j p_j W_j. The sum is attention with the weight as keys and values, so it can be kept
    relative to the largest logit so far and shrunk whenever that grows, as in FlashAttention (arXiv 2205.14135).
    """

    def __init__(self, head: Head, num_rows: int) -> None:
        self.head = head
        self.sum = torch.zeros(num_rows, head.hidden_size, dtype=head.wide, device=head.weight.device)

    def add(self, rows: slice, weights: torch.Tensor, weight: torch.Tensor, shrink: torch.Tensor) -> None:
        """Adds a tile's weights (R, C) of the head's rows (C, H), after what is there has shrunk by (R,)."""
        total = self.sum[rows]
        total.mul_(shrink[:, None].to(total.dtype))
        add_mm(total, weights, weight)

    def finish(self, targets: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """The unit gradient, once every column has been seen; NaN for a target outside the vocabulary."""
        derivative = self.head.transform.derivative(state[TARGET]).masked_fill_(state[TARGET].isnan(), float("nan"))
        own = self.head.weight[targets.clamp(0, self.head.vocab_size - 1)].to(self.head.wide)
        mean = self.sum.div_(state[SUM][:, None].to(self.head.wide))
        return mean.neg_().addcmul_(derivative[:, None].to(self.head.wide), own)


def score_with_unit_gradient(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, outputs: int, state: torch.Tensor
) -> torch.Tensor:
    """Adds all columns to the state (7, N) of all rows; d logprob / d hidden of every row, (N, H) float32 at least."""
    num_rows = hidden.shape[0]
    if head.policy.one_sweep:
        unit = UnitGradient(head, num_rows)
        score_rows(head, hidden, targets, outputs, state, unit_gradient=unit)
        return unit.finish(targets, state)
    gradients = HeadGradients(head, num_rows, need_hidden=True, need_weight=False, need_bias=False, waiting=True)
    height = head.block_rows(num_rows)
    logits = head.empty_logits(height, height)
    for rows in some_tiles(spans(num_rows, max(height, 1)), hidden.device):
        kept = logits.part(slice(rows.stop - rows.start))
        score_rows(head, hidden[rows], targets[rows], outputs, state[:, rows], keep=kept)
        statistics = finish_scores(state[:, rows], outputs, head.vocab_size, head.wide)
        coefficients = statistics.new_zeros(4, rows.stop - rows.start)
        coefficients[0], coefficients[2] = -1.0, 1.0
        coefficients = with_low_part(coefficients, statistics[LSE_LOW_ROW])
        given = (hidden[rows], targets[rows], statistics[LSE_ROW], coefficients)
        gradients.add([RowBlock(rows, *given, kept, consume=True)], last=rows.stop == num_rows)
    return gradients.results(head.wide, head.wide)[0]


class HeadGradients:
    """Sums the gradients of a head over row blocks: hidden (N, H), weight (V, H), bias (V,), each only if needed.

    waiting: the loss has yet to get its factor. Where products are of float16, gradients of logits are then taken
    times a power of two that brings the largest coefficient to about 2¹⁰, and the sums, in float32, divided by it at
    the end; results that would be float16 are float32.
    """

    def __init__(
        self,
        head: Head,
        num_rows: int,
        *,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
        waiting: bool = False,
    ) -> None:
        device = head.weight.device
        self.head = head
        self._waiting = waiting
        self._factor = 1.0
        self.hidden = torch.empty(num_rows, head.hidden_size, dtype=head.wide, device=device) if need_hidden else None
        self.weight: torch.Tensor | None = None
        self._need_weight = need_weight
        self._bias = torch.zeros(head.vocab_size, dtype=head.wide, device=device) if need_bias else None

    def add(self, blocks: list[RowBlock], *, last: bool) -> None:
        """Adds row blocks. `last`: no call follows (a single call needs no wide accumulator for the whole weight)."""
        head = self.head
        if self._waiting and head.dtype == torch.float16:
            blocks = self._fit(blocks)
        accumulate = self.weight is not None
        if self._need_weight and not accumulate:
            dtype = self._result_dtype(head.weight.dtype) if last else head.wide
            self.weight = pooled_empty(head.weight.shape, dtype, head.weight.device)
        tiles = _GradientTiles(head, blocks)
        buffer = self._wide_buffer(tiles)
        need_weight_tile = self.hidden is not None or any(part.logits is None for part in tiles.parts)
        for columns in some_tiles(spans(head.vocab_size, tiles.width), head.weight.device):
            weight = head.weight_tile(columns) if need_weight_tile else None
            total = _WeightTile(self.weight[columns], buffer, accumulate) if self._need_weight else None
            for part in tiles.parts:
                grad = tiles.grad(part, columns, weight)
                if self.hidden is not None:
                    (add_mm if columns.start else mm_into)(self.hidden[part.rows], grad, weight)
                if total is not None:
                    total.add(grad, part.hidden)
                if self._bias is not None:
                    self._bias[columns] += grad.sum(dim=0, dtype=head.wide)
            if total is not None:
                total.finish()

    def _wide_buffer(self, tiles: _GradientTiles) -> torch.Tensor | None:
        """Room to sum a tile of the weight's gradient, if its own dtype will not do for that.

        It does for a single product, which sums in float32 and is rounded once, as the buffer would be.
        """
        dtypes = (self.head.wide, self.head.dtype) if len(tiles.parts) == 1 else (self.head.wide,)
        if not self._need_weight or self.weight.dtype in dtypes:
            return None
        return self.head.scratch(tiles.width, self.head.hidden_size, self.head.wide)

    def _fit(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """The blocks, their coefficients times the factor; sums that are there follow if it has to change."""
        steepest = abs(self.head.transform.scale) * self.head.transform.inv_temperature
        largest = steepest * max((float(block.coefficients.abs().amax()) for block in blocks), default=0.0)
        if largest and (self._factor == 1.0 or largest * self._factor > 2.0**13):
            factor = math.ldexp(1.0, min(100, 10 - math.frexp(largest)[1]))
            for total in self._sums():
                total.mul_(factor / self._factor)
            self._factor = factor
        return [replace(block, coefficients=block.coefficients * self._factor) for block in blocks]

    def _result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return waiting_dtype(dtype) if self._waiting else dtype

    def _sums(self) -> list[torch.Tensor]:
        return [total for total in (self.hidden, self.weight, self._bias) if total is not None]

    def spread_hidden(self, index: torch.Tensor, num_rows: int) -> None:
        """Moves the gradients of the first A rows to the rows `index` (A,) of `num_rows`; the others get zero."""
        everywhere = self.hidden.new_zeros(num_rows, self.head.hidden_size)
        self.hidden = everywhere.index_copy_(0, index, self.hidden[: len(index)])

    def results(
        self, hidden_dtype: torch.dtype, bias_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden, weight, bias) gradients, each of its tensor's dtype or the one it waits in; empty if not needed."""
        device = self.head.weight.device
        dtypes = [self._result_dtype(dtype) for dtype in (hidden_dtype, self.head.weight.dtype, bias_dtype)]
        if self._need_weight and self.weight is None:
            self.weight = torch.zeros(self.head.weight.shape, dtype=dtypes[1], device=device)
        if self._factor != 1.0:
            for total in self._sums():
                total.mul_(1 / self._factor)
        grads = zip((self.hidden, self.weight, self._bias), dtypes, strict=True)
        return tuple(torch.empty(0, dtype=to, device=device) if g is None else as_dtype(g, to) for g, to in grads)


class _GradientTiles:
    """Gradients of logits of some row blocks, tile by tile: in scratch memory, or where their logits lie.

    parts: the blocks, cut to the tiles' rows; width: columns of a tile. Gradients that take the place of logits need
    no scratch, so that on a GPU one tile has all columns.
    """

    def __init__(self, head: Head, blocks: list[RowBlock]) -> None:
        self.head = head
        num_rows = max((len(block.targets) for block in blocks), default=0)
        kept_logits = next((block.logits for block in blocks if block.logits is not None), None)
        if head.policy.whole_rows and all(map(self._in_place, blocks)):
            height, self.width = num_rows, head.vocab_size
        else:
            height, self.width = head.tiling(num_rows, kept_logits, gradients=True)
        self.parts = [part for block in blocks for part in block.parts(height)]
        in_scratch = [part for part in self.parts if not self._in_place(part)]
        with_logits = [part for part in in_scratch if not part.packed and not (part.logits and part.index is None)]
        self._logits = head.scratch(_most_rows(with_logits), self.width, head.logits_dtype)
        self._grads = self._logits
        if head.narrow_gradients or _most_rows(in_scratch) > len(self._logits):
            self._grads = head.scratch(_most_rows(in_scratch), self.width, head.dtype)

    def _in_place(self, block: RowBlock) -> bool:
        """Whether a gradient is as wide as what is kept of its logits, which may be overwritten."""
        return block.overwritable and self.head.dtype.itemsize == block.logits.values.element_size()

    def grad(self, block: RowBlock, columns: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """The gradient (R, C) of a block's logits; weight: (C, H), for logits that are to be computed again."""
        corner = (slice(len(block.targets)), slice(columns.stop - columns.start))
        given = (block.targets, block.lse, block.coefficients, columns)
        if block.packed:
            kept = block.logits.tile(columns)
            out = kept.values.view(self.head.dtype) if self._in_place(block) else self._grads[corner]
            return self.head.grad_packed(kept, block.index, *given, out)
        logits = block.raw_logits(columns, weight, self._logits[corner])
        return self.head.grad(logits, *given, logits if self._in_place(block) else self._grads[corner])


def _most_rows(blocks: list[RowBlock]) -> int:
    return max((len(block.targets) for block in blocks), default=0)


class _WeightTile:
    """The weight's gradient of one vocabulary tile, summed over row blocks: where it belongs, or in a wide buffer."""

    def __init__(self, total: torch.Tensor, buffer: torch.Tensor | None, accumulate: bool) -> None:
        self.total = total
        self.sum = total if buffer is None else buffer[: total.shape[0]]
        self.empty = not accumulate

    def add(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds gradᵀ (C, R) @ hidden (R, H)."""
        if not self.empty:
            add_mm(self.sum, grad.t(), hidden)
        else:
            mm_into(self.sum, grad.t(), hidden)
        self.empty = False

    def finish(self) -> None:
        """Puts the sum where it belongs; without any row it is zero."""
        if self.empty:
            self.total.zero_()
        elif self.sum is not self.total:
            self.total.copy_(self.sum)
