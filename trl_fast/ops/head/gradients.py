"""Sums the gradients of hidden states, weight and bias, in sweeps over row blocks and tiles, as the plan says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..matmul import add_mm, mm_into
from ..memory_pool import as_dtype, pooled_empty
from .kept_logits import KeptLogits, KeptTile
from .plan import SweepTiles
from .row_kernels import ROW_KERNELS
from .tiled_head import TiledHead
from .transient_weight import TiledGradient


class Needs(NamedTuple):
    """Says which tensors of a head need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a gradient, for a tensor of `dtype`, that still waits for the factor of its loss.

    float16 ends at 6e-8: what a mean over many tokens leaves of a probability is below that until a loss scale
    multiplies it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def head_gradients(
    head: TiledHead,
    needs: Needs,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    logits: KeptLogits,
    tiled: TiledGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of hidden (N, H), weight (V, H) and bias (V,), in their dtypes; empty if not needed.

    targets: (N,) int64; lse: (N,); coefficients: (4, N), see row_kernels.py; logits: of the first rows, which are left
    as they are. On a CPU rows whose coefficients are all zero take no part. tiled: takes the weight's gradient, a
    tile at a time; what is returned of it is empty then.
    """
    gradients = HeadGradients(head, hidden.shape[0], needs, tiled=tiled)
    given = (hidden.to(head.plan.product_dtype), targets, lse, coefficients, logits)
    gradients.add(slice(0, hidden.shape[0]), *given, skip_zero_rows=None, last=True)
    return gradients.results(hidden.dtype, head.weight.dtype if head.bias is None else head.bias.dtype)


class HeadGradients:
    """Sums the gradients of a head over row blocks: hidden (N, H), weight (V, H), bias (V,), each only if needed.

    num_rows: N; waiting: the loss has yet to get its factor. Where products are of float16, gradients of logits are
    then taken times a power of two that brings the largest coefficient to about 2¹⁰, and the sums, in float32, divided
    by it at the end; results that would be float16 are float32. tiled: takes the weight's gradient instead, of all
    rows added at once.
    """

    def __init__(
        self,
        head: TiledHead,
        num_rows: int,
        needs: Needs,
        *,
        waiting: bool = False,
        tiled: TiledGradient | None = None,
    ) -> None:
        self._head = head
        self._num_rows = num_rows
        self._needs = needs
        self._waiting = waiting
        self._tiled = tiled
        self._factor = 1.0
        self._hidden: torch.Tensor | None = None
        self._weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        if needs.bias:
            self._bias = torch.zeros(head.plan.vocab_size, dtype=head.plan.sum_dtype, device=head.weight.device)
        # The rows that have been added: how many, and of each block its place and which of its rows.
        self._added = 0
        self._places: list[tuple[slice, torch.Tensor | None]] = []

    def add(
        self,
        place: slice,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        coefficients: torch.Tensor,
        logits: KeptLogits | None = None,
        *,
        consume: bool = False,
        skip_zero_rows: bool | None = False,
        last: bool = False,
    ) -> None:
        """Adds the gradients of the next rows.

        Args:
            place: where the rows lie among all N.
            hidden: (R, H) in the product's dtype; targets: (R,) int64; lse: (R,).
            coefficients: (4, R), see row_kernels.py.
            logits: of the first of these rows; those of the others are computed again.
            consume: whether kept logits may be overwritten.
            skip_zero_rows: whether rows without a coefficient are left out; see active_rows.
            last: no call follows. (A single call needs no float32 sum of the whole weight's gradient.)
        """
        if self._head.shard is not None:
            targets = self._head.shard.local(targets)
        index = active_rows(coefficients, skip_zero_rows)
        by_row = coefficients.t()
        if index is not None:
            hidden, targets, lse, by_row = hidden[index], targets[index], lse[index], by_row[index]
        blocks = _row_blocks(self._head, self._added, hidden, targets, lse, by_row, logits, index, consume)
        self._added += len(hidden)
        if self._needs.hidden and self._hidden is None:
            rows = self._added if last else self._num_rows
            self._hidden = torch.empty(
                rows, self._head.plan.hidden_size, dtype=self._head.plan.sum_dtype, device=self._head.weight.device
            )
        self._places.append((place, index))
        self._sweep(blocks, last)

    def _sweep(self, blocks: list[RowBlock], last: bool) -> None:
        head, plan = self._head, self._head.plan
        if self._waiting and plan.product_dtype == torch.float16:
            blocks = self._fit(blocks)
        accumulate = self._weight is not None
        if self._needs.weight and not accumulate and self._tiled is None:
            dtype = self._result_dtype(head.weight.dtype) if last else plan.sum_dtype
            self._weight = pooled_empty(head.weight.shape, dtype, head.weight.device)
        tiles = _gradient_tiles(head, blocks, None if self._tiled is None else self._tiled.most_rows)
        parts = [part for block in blocks for part in block.parts(tiles.num_rows)]
        logit_gradients = _LogitGradients(head, parts, tiles.num_columns)
        buffer = self._weight_buffer(tiles, len(parts))
        need_weight_tile = self._needs.hidden or any(part.logits is None for part in parts)
        for columns in tiles.columns:
            weight = None
            if need_weight_tile:
                weight = head.cast_tile(columns) if plan.casts_weight else head.weight[columns]
            total = self._weight_tile(columns, buffer, accumulate)
            for part in parts:
                gradient = logit_gradients.of(part, columns, weight)
                if self._hidden is not None:
                    assert weight is not None, "the gradient of hidden states needs a tile of it"
                    (add_mm if columns.start else mm_into)(self._hidden[part.rows], gradient, weight)
                if total is not None:
                    total.add(gradient, part.hidden)
                if self._bias is not None:
                    self._bias[columns] += gradient.sum(dim=0, dtype=plan.sum_dtype)
            if total is not None:
                total.finish()
                if self._tiled is not None:
                    self._tiled.add(columns, total.total)

    def _weight_tile(self, columns: slice, buffer: torch.Tensor | None, accumulate: bool) -> _WeightTile | None:
        """Returns where the weight's gradient of a tile's columns is summed, if it is needed."""
        if self._needs.weight and self._tiled is not None:
            assert buffer is not None, "what is sent has room of its own"
            return _WeightTile(buffer[: columns.stop - columns.start], None, accumulate)
        return None if self._weight is None else _WeightTile(self._weight[columns], buffer, accumulate)

    def _weight_buffer(self, tiles: SweepTiles, num_parts: int) -> torch.Tensor | None:
        """Returns room to sum a tile of the weight's gradient, if its own dtype will not do for that.

        It does for a single product, which sums in float32 and is rounded once, as the buffer would be.
        """
        plan = self._head.plan
        dtypes = (plan.sum_dtype, plan.product_dtype) if num_parts == 1 else (plan.sum_dtype,)
        if self._tiled is None and (self._weight is None or self._weight.dtype in dtypes):
            return None
        return pooled_empty((tiles.num_columns, self._head.plan.hidden_size), plan.sum_dtype, self._head.weight.device)

    def _fit(self, blocks: list[RowBlock]) -> list[RowBlock]:
        """Returns the blocks, coefficients times the factor; sums that are there follow if it has to change."""
        steepest = abs(self._head.transform.scale) * self._head.transform.inv_temperature
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
        return [total for total in (self._hidden, self._weight, self._bias) if total is not None]

    def results(
        self, hidden_dtype: torch.dtype, bias_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the gradients of hidden (N, H), weight (V, H) and bias (V,); empty tensors if not needed.

        Each has its tensor's dtype, or the one it waits in. Collective where other processes have columns too.
        """
        head = self._head
        dtypes = [self._result_dtype(dtype) for dtype in (hidden_dtype, head.weight.dtype, bias_dtype)]
        if self._needs.hidden and self._added < self._num_rows:
            self._spread_hidden()
        if self._needs.hidden and self._hidden is None:
            self._hidden = torch.empty(0, head.plan.hidden_size, dtype=head.plan.sum_dtype, device=head.weight.device)
        if self._hidden is not None and head.shard is not None:
            head.shard.add_up(self._hidden)
        if self._needs.weight and self._weight is None and self._tiled is None:
            self._weight = torch.zeros(head.weight.shape, dtype=dtypes[1], device=head.weight.device)
        if self._factor != 1.0:
            for total in self._sums():
                total.mul_(1 / self._factor)
        totals = zip((self._hidden, self._weight, self._bias), dtypes, strict=True)
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(0, dtype=dtype, device=head.weight.device)
            if total is None
            else total
            if total.dtype == dtype
            else as_dtype(total, dtype)
            for total, dtype in totals
        )
        return grad_hidden, grad_weight, grad_bias

    def _spread_hidden(self) -> None:
        """Moves the gradients of the rows that were added to where they lie among all rows; the others get zero."""
        assert self._hidden is not None, "rows have been added"
        numbers = [
            torch.arange(place.start, place.stop, device=self._head.weight.device)
            if index is None
            else place.start + index
            for place, index in self._places
        ]
        everywhere = self._hidden.new_zeros(self._num_rows, self._head.plan.hidden_size)
        self._hidden = everywhere.index_copy_(0, torch.cat(numbers), self._hidden[: self._added])


def active_rows(coefficients: torch.Tensor, skip_zero_rows: bool | None = None) -> torch.Tensor | None:
    """Returns the numbers (A,) int64 of the rows whose coefficients (4, R) are not all zero; None if all rows count.

    skip_zero_rows: whether to find out; if not, every row counts. None: on a CPU, since the host of a GPU would have
    to wait.
    """
    if not (coefficients.device.type == "cpu" if skip_zero_rows is None else skip_zero_rows):
        return None
    active = coefficients.ne(0).any(dim=0)
    return None if bool(active.all()) else active.nonzero().squeeze(1)


@dataclass
class RowBlock:
    """Holds rows whose gradient is computed together.

    rows: their place among those that are added; hidden: (R, H); targets, lse: (R,); coefficients: (4, R), see
    row_kernels.py. logits: if they are kept, else they are computed again; index: (R,) their rows in `logits`, None
    for all in order; in_place: whether the gradient takes the place of the logits.
    """

    rows: slice
    hidden: torch.Tensor
    targets: torch.Tensor
    lse: torch.Tensor
    coefficients: torch.Tensor
    logits: KeptLogits | None
    index: torch.Tensor | None
    in_place: bool

    def parts(self, height: int) -> Iterator[RowBlock]:
        """Yields the same in blocks of at most `height` rows."""
        num_rows = len(self.targets)
        for start in range(0, num_rows, height):
            part = slice(start, min(start + height, num_rows))
            rows = slice(self.rows.start + part.start, self.rows.start + part.stop)
            logits, index = self.logits, None
            if self.index is not None:
                index = self.index[part]
            elif logits is not None and part.stop - part.start < logits.values.shape[1]:
                logits = logits.part(part)
            vectors = (self.hidden[part], self.targets[part], self.lse[part], self.coefficients[:, part].contiguous())
            yield RowBlock(rows, *vectors, logits, index, self.in_place)


def _row_blocks(
    head: TiledHead,
    start: int,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    logits: KeptLogits | None,
    index: torch.Tensor | None,
    consume: bool,
) -> list[RowBlock]:
    """Returns the rows whose logits are kept as a block, and the others as another one.

    start: place of the first row; coefficients: (R, 4); logits: of the first K rows that were scored; index: (R,)
    numbers of the rows among those, rising, None if they are all of them.
    """
    num_rows, num_kept = len(targets), 0 if logits is None else logits.values.shape[1]
    kept = min(num_rows, num_kept) if index is None else int((index < num_kept).sum())
    in_place = consume and index is None and logits is not None
    if logits is not None:
        in_place = in_place and head.plan.product_dtype.itemsize == logits.values.element_size()
    blocks = []
    for part, source in ((slice(0, kept), logits), (slice(kept, num_rows), None)):
        if part.stop > part.start:
            chosen = index[part] if index is not None and source is not None else None
            place = slice(start + part.start, start + part.stop)
            vectors = (hidden[part], targets[part], lse[part], coefficients[part].t())
            blocks.append(RowBlock(place, *vectors, source, chosen, in_place and source is not None))
    return blocks


def _most_rows(blocks: list[RowBlock]) -> int:
    return max((len(block.targets) for block in blocks), default=0)


def _gradient_tiles(head: TiledHead, blocks: list[RowBlock], most_columns: int | None) -> SweepTiles:
    """Returns the tiles in which the plan has the gradients of these blocks computed; most_columns: if limited."""
    kept = next((block.logits for block in blocks if block.logits is not None), None)
    in_place = all(block.in_place for block in blocks)
    num_kept, num_bytes = (0, 0) if kept is None else (kept.values.shape[1], kept.nbytes)
    given = (_most_rows(blocks), num_kept, num_bytes, most_columns)
    return head.plan.gradient_tiles(*given, in_place=in_place)


class _LogitGradients:
    """Computes gradients of logits, tile by tile: in scratch memory, or where their logits lie.

    parts: rows of a tile each; width: columns of a tile.
    """

    def __init__(self, head: TiledHead, parts: list[RowBlock], width: int) -> None:
        plan = head.plan
        self._head = head
        in_scratch = [part for part in parts if not part.in_place]
        passing = [part for part in in_scratch if part.logits is None or not plan.packed and part.index is not None]
        num_rows, num_passing = _most_rows(in_scratch), _most_rows(passing)
        self._logits: torch.Tensor | None = None
        self._gradients: torch.Tensor | None = None
        if num_passing:
            self._logits = self._gradients = pooled_empty((num_passing, width), plan.logits_dtype, head.weight.device)
        if num_rows and (plan.limits.narrow_gradients or num_rows > num_passing):
            self._gradients = pooled_empty((num_rows, width), plan.product_dtype, head.weight.device)

    def of(self, part: RowBlock, columns: slice, weight: torch.Tensor | None) -> torch.Tensor:
        """Returns the gradient (R, C) of a part's logits; weight: (C, H), for logits that are to be computed again."""
        head = self._head
        if part.logits is None:
            assert weight is not None, "computing logits again needs a tile of it"
            logits = mm_into(_corner(self._logits, part, columns), part.hidden, weight.t())
        else:
            kept = part.logits.tile(columns)
            if head.plan.packed:
                out = (
                    kept.values.view(head.plan.product_dtype)
                    if part.in_place
                    else _corner(self._gradients, part, columns)
                )
                return _grad_packed(head, part, columns, kept, out)
            logits = kept.values
            if part.index is not None:
                logits = torch.index_select(logits, 0, part.index, out=_corner(self._logits, part, columns))
        out = logits if part.in_place else _corner(self._gradients, part, columns)
        bias = None if head.bias is None else head.bias[columns]
        given = (logits, part.targets, bias, *head.transform, part.lse, part.coefficients, columns.start)
        head.kernels.grad(*given, out)
        return out


def _corner(scratch: torch.Tensor | None, part: RowBlock, columns: slice) -> torch.Tensor:
    """Returns the corner (R, C) of scratch memory that a part's tile takes."""
    assert scratch is not None, "there is scratch memory for every part that passes through it"
    return scratch[: len(part.targets), : columns.stop - columns.start]


def _grad_packed(head: TiledHead, part: RowBlock, columns: slice, kept: KeptTile, out: torch.Tensor) -> torch.Tensor:
    """Computes the gradient (R, C) of packed logits, words (K, C) int16 and tops (K, chunks), into `out`."""
    scale, _, inv_temperature = head.transform
    given = (kept.values, part.index, part.targets, scale, inv_temperature, part.lse, part.coefficients)
    # The chunks of the fused kernel are no others' but Triton's.
    kernels, chunk = (head.kernels, ()) if head.plan.fused is None else (ROW_KERNELS["triton"], (head.plan.chunk,))
    assert kernels.grad_packed is not None, "the plan packs only what the kernels unpack"
    kernels.grad_packed(*given, columns.start, out, kept.tops, *chunk)
    return out


class _WeightTile:
    """Sums the weight's gradient of one vocabulary tile over row blocks: where it belongs, or in a float32 buffer."""

    def __init__(self, total: torch.Tensor, buffer: torch.Tensor | None, accumulate: bool) -> None:
        self.total = total
        self.sum = total if buffer is None else buffer[: total.shape[0]]
        self.empty = not accumulate

    def add(self, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds gradientᵀ (C, R) @ hidden (R, H)."""
        if not self.empty:
            add_mm(self.sum, gradient.t(), hidden)
        else:
            mm_into(self.sum, gradient.t(), hidden)
        self.empty = False

    def finish(self) -> None:
        """Puts the sum where it belongs; without any row it is zero."""
        if self.empty:
            self.total.zero_()
        elif self.sum is not self.total:
            self.total.copy_(self.sum)
