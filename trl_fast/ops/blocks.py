"""The head's three matrix products, in tiles of bounded size.

The vocabulary is walked tile by tile, and the rows within it. A tile of the weight is thus widened or read once for
all rows, a tile of logits is still in the cache when the row kernels read it, and a tile of the weight's gradient is
finished in one go. Everything that scales with rows times vocabulary lives in one workspace. What of it waits for the
gradient is in kept_logits.py.

On a GPU, logits are float32: products of 16-bit numbers accumulate in float32 and can be written as such. All logits
are, kept ones too, because a gradient needs the very logits that its log-sum-exp came from: with a log-sum-exp of
float32 logits, but bfloat16 logits, the gradient of rows with a confident prediction was off by a quarter. Gradients
of logits have the dtype of the products that they go into.

GEMMs are ATen's. Where the machine has no fast bfloat16 or float16 product (a CPU without AMX or AVX512-BF16), tiles
of the weight are widened to float32 on the way: the product is then one to two orders of magnitude faster, and exact.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from .backends import load_extension
from .fused_scores import score_rows_fused, serves_fused
from .kept_logits import PACKED_DTYPE, KeptLogits, packed_columns
from .products import add_mm, logits_dtype, mm_into
from .row_blocks import RowBlock
from .rows import ROW_KERNELS, SUM, TARGET, TOP, rescale, row_weights_by_two
from .spans import even_step, spans
from .transform import LogitTransform

DEFAULT_WORKSPACE_BYTES = 1 << 30
# A tile of logits is at most this share of the workspace.
_TILE_SHARE = 4
# On a CPU the tiles of logits and of widened weight each stay below this; larger ones were no faster.
_CACHE_BYTES = 32 << 20
_CPU_TILE_ROWS = 2048
_MIN_TILE_COLUMNS = 512
# Held memory comes in huge pages of 2 MiB.
_HELD_FROM_BYTES = 8 << 20


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor whose memory is there. A CPU product that writes to fresh pages waits for each page.

    On the CPU, what is large comes from memory that the extension holds between calls (csrc/cpu/held_memory.h).
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    if math.prod(shape) * dtype.itemsize >= _HELD_FROM_BYTES and load_extension().ok:
        return torch.ops.trl_fast.held_empty(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient, for a tensor of `dtype`, that still waits for the factor of its loss.

    float16 ends at 6e-8: what a mean over many tokens leaves of a probability is below that until a loss scale
    multiplies it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def _as_dtype(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient in `dtype`, in memory that is there."""
    if gradient.dtype == dtype:
        return gradient
    return large_empty(gradient.shape, dtype, gradient.device).copy_(gradient)


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gradient * factor (0-d) in `dtype`: a head's gradient in memory that is there."""
    out = large_empty(gradient.shape, dtype, gradient.device)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)


def row_bytes(vocab_size: int, dtype: torch.dtype, backend: str) -> int:
    """Bytes of workspace that one row of logits takes, temporaries of the backend's row kernels included."""
    return vocab_size * (dtype.itemsize + ROW_KERNELS[backend].bytes_per_element)


def rows_per_block(num_rows: int, bytes_per_row: int, workspace_bytes: int) -> int:
    """How many rows of logits fit the workspace, at most num_rows.

    Raises:
        ValueError: not even one row fits.
    """
    if workspace_bytes < bytes_per_row:
        raise ValueError(
            f"workspace_bytes: {workspace_bytes} bytes hold no row of logits; one row takes {bytes_per_row} bytes"
        )
    return min(num_rows, workspace_bytes // bytes_per_row)


class Tiling(NamedTuple):
    """Rows and columns of a tile of logits."""

    rows: int
    columns: int


class Head:
    """A head's weight and transform, with its products. Nothing here has a gradient of its own.

    weight: (V, H) any float dtype; bias: (V,) or None; dtype: what products are computed in.

    Raises:
        ValueError: the workspace holds no row of logits.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        dtype: torch.dtype,
        backend: str,
        workspace_bytes: int,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.transform = transform
        self.dtype = dtype
        # Partial sums of narrow dtypes would lose what the tiles contribute: accumulate in float32 at least.
        self.wide = torch.promote_types(dtype, torch.float32)
        self.backend = backend
        self.kernels = ROW_KERNELS[backend]
        self.vocab_size, self.hidden_size = weight.shape
        self.logits_dtype = logits_dtype(dtype, weight.device)
        self.row_bytes = row_bytes(self.vocab_size, self.logits_dtype, backend)
        self.workspace_bytes = workspace_bytes
        self._cast_tile: torch.Tensor | None = None
        rows_per_block(1, self.row_bytes, workspace_bytes)

    @property
    def packs(self) -> bool:
        """Whether kept logits are packed: those of 16-bit weights, where float32 takes more room than they know.

        Not with a softcap, whose derivative would be off by more than a probability where logits are near the cap.
        """
        sixteen = self.weight.dtype in (torch.bfloat16, torch.float16) and self.logits_dtype == torch.float32
        return sixteen and not self.transform.softcap and self.kernels.grad_packed is not None

    def kept_rows(self, num_rows: int, *, raw: bool = False) -> int:
        """How many whole rows of logits the workspace holds with a tile beside them. raw: never packed."""
        packed_bytes = packed_columns(self.vocab_size) * PACKED_DTYPE.itemsize
        row_bytes = packed_bytes if self.packs and not raw else self.row_bytes
        return min(num_rows, (self.workspace_bytes - self.workspace_bytes // _TILE_SHARE) // row_bytes)

    def block_rows(self, num_rows: int, *, raw: bool = False) -> int:
        """The rows of a block, for ops that go block by block in equal parts: at least one, if there are any."""
        return even_step(num_rows, max(1, self.kept_rows(num_rows, raw=raw)))

    def tiling(self, num_rows: int, kept_logits: KeptLogits | None = None) -> Tiling:
        """The tiles for `num_rows` rows: within a share of the workspace, and on a CPU within its cache.

        kept_logits: their tiles decide the columns if there are any.
        """
        element = self.row_bytes // self.vocab_size + (self.dtype.itemsize if self.narrow_gradients else 0)
        budget = self.workspace_bytes // _TILE_SHARE
        rows, columns = num_rows, self.vocab_size
        if self.weight.device.type == "cpu":
            budget = min(budget, _CACHE_BYTES)
            rows = even_step(rows, _CPU_TILE_ROWS)
            columns = min(columns, _CACHE_BYTES // (self.hidden_size * self.dtype.itemsize))
        columns = max(_MIN_TILE_COLUMNS, min(columns, budget // max(1, rows * element)) // 64 * 64)
        columns = min(self.vocab_size, columns)
        if kept_logits is not None and kept_logits.num_rows:
            columns = kept_logits.columns
        return Tiling(max(1, min(rows, budget // (columns * element))), columns)

    def empty_logits(self, num_kept: int, num_rows: int, *, raw: bool = False) -> KeptLogits:
        """Room for the logits of `num_kept` rows, in tiles as they are for `num_rows` rows in all. raw: not packed."""
        width = self.tiling(num_rows).columns
        num_tiles = -(-self.vocab_size // width)
        packed = self.packs and not raw
        shape = (num_tiles, num_kept, packed_columns(width) if packed else width)
        dtype = PACKED_DTYPE if packed else self.logits_dtype
        return KeptLogits(large_empty(shape, dtype, self.weight.device))

    @property
    def narrow_gradients(self) -> bool:
        """Whether gradients of logits are narrower than logits, and so cannot take their place."""
        return self.logits_dtype != self.dtype

    def scratch(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for tiles of up to this size."""
        return large_empty((rows, columns), dtype, self.weight.device)

    def weight_tile(self, columns: slice) -> torch.Tensor:
        """Rows `columns` of the weight, (C, H) in the product's dtype; valid until the next call."""
        tile = self.weight[columns]
        if tile.dtype == self.dtype:
            return tile
        if self._cast_tile is None or self._cast_tile.shape[0] < tile.shape[0]:
            self._cast_tile = large_empty(tile.shape, self.dtype, tile.device)
        return self._cast_tile[: tile.shape[0]].copy_(tile)

    def score(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        columns: slice,
        outputs: int,
        state: torch.Tensor,
        packed: torch.Tensor | None = None,
    ) -> None:
        """Adds raw logits (R, C) of the given columns to the rows' state (7, R); `packed` (R, ...) keeps them."""
        bias = None if self.bias is None else self.bias[columns]
        given = (logits, targets, bias)
        if packed is None:
            self.kernels.scores(*given, *self.transform, outputs, columns.start, state)
        else:
            scale, _, inv_temperature = self.transform
            self.kernels.scores_packed(*given, scale, inv_temperature, outputs, columns.start, state, packed)

    def weigh(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        columns: slice,
        outputs: int,
        state: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The same; e^(u - m) du/dz, m being the rows' largest logit so far, in `out` (may be `logits` itself)."""
        bias = None if self.bias is None else self.bias[columns]
        weights = self.kernels.weights or functools.partial(row_weights_by_two, self.kernels)
        weights(logits, targets, bias, *self.transform, outputs, columns.start, state, out)
        return out

    def grad(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        coefficients: torch.Tensor,
        columns: slice,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Gradient of raw logits (R, C) of the given columns, written to `out` (may be `logits` itself)."""
        bias = None if self.bias is None else self.bias[columns]
        self.kernels.grad(logits, targets, bias, *self.transform, lse, coefficients, columns.start, out)
        return out

    def grad_packed(
        self,
        packed: torch.Tensor,
        index: torch.Tensor | None,
        targets: torch.Tensor,
        lse: torch.Tensor,
        coefficients: torch.Tensor,
        columns: slice,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The same of the rows `index` (R,), None for all in order, of packed logits (K, ...)."""
        scale, _, inv_temperature = self.transform
        given = (packed, index, targets, scale, inv_temperature, lse, coefficients)
        self.kernels.grad_packed(*given, columns.start, out)
        return out


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
    goes through the same tiles. With neither there is no gradient to come, and a fused kernel may serve.
    """
    no_gradient = keep is None and unit_gradient is None
    if no_gradient and serves_fused(head.backend, head.weight, head.dtype, head.logits_dtype.itemsize):
        given = (hidden, head.weight, targets, head.bias, head.transform)
        return score_rows_fused(*given, outputs, state, head.workspace_bytes)
    num_rows = hidden.shape[0]
    kept = 0 if keep is None else keep.num_rows
    height, width = head.tiling(num_rows, keep)
    parts = [*spans(kept, height), *(slice(kept + s.start, kept + s.stop) for s in spans(num_rows - kept, height))]
    passing = num_rows if keep is None or keep.packed else num_rows - kept
    scratch = head.scratch(min(height, passing), width, head.logits_dtype)
    gives_narrow = unit_gradient is not None and head.narrow_gradients
    room_for_weights = head.scratch(height, width, head.dtype) if gives_narrow else scratch
    for number, columns in enumerate(spans(head.vocab_size, width)):
        weight = head.weight_tile(columns)
        for rows in parts:
            corner = (slice(rows.stop - rows.start), slice(columns.stop - columns.start))
            room = keep.values[number, rows] if rows.start < kept else None
            packed = room if room is not None and keep.packed else None
            tile = scratch[corner] if room is None or keep.packed else room[:, corner[1]]
            mm_into(tile, hidden[rows], weight.t())
            if unit_gradient is None:
                head.score(tile, targets[rows], columns, outputs, state[:, rows], packed)
                continue
            top = state[TOP, rows].clone()
            out = room_for_weights[: tile.shape[0], : tile.shape[1]]
            weights = head.weigh(tile, targets[rows], columns, outputs, state[:, rows], out)
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
        slope = self.head.transform.slope(state[TARGET]).masked_fill_(state[TARGET].isnan(), float("nan"))
        own = self.head.weight[targets.clamp(0, self.head.vocab_size - 1)].to(self.head.wide)
        mean = self.sum.div_(state[SUM][:, None].to(self.head.wide))
        return mean.neg_().addcmul_(slope[:, None].to(self.head.wide), own)


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
        self.hidden = torch.zeros(num_rows, head.hidden_size, dtype=head.wide, device=device) if need_hidden else None
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
            self.weight = large_empty(head.weight.shape, dtype, head.weight.device)
        kept_logits = next((block.logits for block in blocks if block.logits is not None), None)
        height, width = head.tiling(max((len(block.targets) for block in blocks), default=0), kept_logits)
        parts = [part for block in blocks for part in block.parts(height)]
        in_place = not head.narrow_gradients and all(part.in_place for part in parts)
        scratch = head.scratch(0 if in_place else height, width, head.logits_dtype)
        grads = head.scratch(height, width, head.dtype) if head.narrow_gradients else scratch
        narrow = self._need_weight and self.weight.dtype != head.wide
        buffer = scratch.new_empty(width if narrow else 0, head.hidden_size, dtype=head.wide)
        need_weight_tile = self.hidden is not None or any(part.logits is None for part in parts)
        for number, columns in enumerate(spans(head.vocab_size, width)):
            weight = head.weight_tile(columns) if need_weight_tile else None
            weight_sum = _WeightTile(self.weight[columns], buffer, accumulate) if self._need_weight else None
            for part in parts:
                corner = (slice(len(part.targets)), slice(columns.stop - columns.start))
                grad = self._block_grad(part, number, columns, weight, scratch[corner], grads[corner])
                if self.hidden is not None:
                    add_mm(self.hidden[part.rows], grad, weight)
                if weight_sum is not None:
                    weight_sum.add(grad, part.hidden)
                if self._bias is not None:
                    self._bias[columns] += grad.sum(dim=0, dtype=head.wide)
            if weight_sum is not None:
                weight_sum.finish()

    def _block_grad(
        self,
        block: RowBlock,
        number: int,
        columns: slice,
        weight: torch.Tensor | None,
        scratch: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The gradient (R, C) of a block's logits in tile `number`: in `out`, or where the logits lie."""
        given = (block.targets, block.lse, block.coefficients, columns)
        if block.packed:
            return self.head.grad_packed(block.logits.values[number], block.index, *given, out)
        logits = block.raw_logits(number, weight, scratch)
        in_place = block.in_place and not self.head.narrow_gradients
        return self.head.grad(logits, *given, logits if in_place else out)

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
        return tuple(torch.empty(0, dtype=t, device=device) if grad is None else _as_dtype(grad, t) for grad, t in grads)


class _WeightTile:
    """The weight's gradient of one vocabulary tile, summed over row blocks in the widest dtype at hand."""

    def __init__(self, total: torch.Tensor, buffer: torch.Tensor, accumulate: bool) -> None:
        self.total = total
        self.sum = total if total.dtype == buffer.dtype else buffer[: total.shape[0]]
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
