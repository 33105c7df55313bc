"""The head's three matrix products, in row blocks and vocabulary tiles of bounded size.

Everything that scales with rows times vocabulary lives in one workspace. A forward pass fills it with full rows (the
row kernels then read each row once); a backward pass knows the rows' log-sum-exps, so it works on vocabulary tiles of
all rows at once, and each tile of the weight's gradient is finished in one go, with no second [V, H] accumulator.

GEMMs are ATen's. Where the machine has no fast bfloat16 or float16 product (a CPU without AMX or AVX512-BF16), tiles
of the weight are widened to float32 on the way: the product is then one to two orders of magnitude faster, and exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from .rows import ROW_KERNELS
from .transform import LogitTransform

DEFAULT_WORKSPACE_BYTES = 1 << 30
# Scratch tiles are this share of the workspace: small enough for the cache to hold on to, wide enough for GEMMs.
_TILE_SHARE = 16
_MIN_TILE_COLUMNS = 2048


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def gemm_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which products with `tensor` are computed on its device."""
    if tensor.device.type != "cpu" or tensor.dtype in (torch.float32, torch.float64):
        return tensor.dtype
    if tensor.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        return tensor.dtype
    return torch.float32


def row_bytes(vocab_size: int, dtype: torch.dtype, backend: str) -> int:
    """Bytes of workspace that one row of logits takes, temporaries of the backend's row kernels included."""
    return vocab_size * (dtype.itemsize + ROW_KERNELS[backend].bytes_per_element)


def rows_per_block(num_rows: int, bytes_per_row: int, workspace_bytes: int) -> int:
    """How many rows of logits fit the workspace, at least 1 and at most num_rows.

    Raises:
        ValueError: not even one row fits.
    """
    if workspace_bytes < bytes_per_row:
        raise ValueError(
            f"workspace_bytes: {workspace_bytes} bytes hold no row of logits; one row takes {bytes_per_row} bytes"
        )
    return max(1, min(num_rows, workspace_bytes // bytes_per_row))


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


class Head:
    """A head's weight and transform, with its products. Nothing here has a gradient of its own.

    weight: (V, H) any float dtype; bias: (V,) or None; dtype: what products are computed in.
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
        self.kernels = ROW_KERNELS[backend]
        self.vocab_size, self.hidden_size = weight.shape
        self.row_bytes = row_bytes(self.vocab_size, dtype, backend)
        self.workspace_bytes = workspace_bytes
        self._cast_tile: torch.Tensor | None = None

    def block_rows(self, num_rows: int) -> int:
        """Rows of a forward block."""
        return rows_per_block(num_rows, self.row_bytes, self.workspace_bytes)

    def tile_columns(self, num_rows: int) -> int:
        """Columns of a backward tile over `num_rows` rows: a share of the workspace, and no narrower than pays."""
        element = self.row_bytes // self.vocab_size
        columns = self.workspace_bytes // _TILE_SHARE // max(1, num_rows * element)
        return min(self.vocab_size, max(_MIN_TILE_COLUMNS, columns // 64 * 64))

    def gradient_rows(self, num_rows: int) -> int:
        """Rows of a backward block: all of them, unless even the narrowest tile would then exceed the workspace."""
        narrowest = min(_MIN_TILE_COLUMNS, self.vocab_size) * (self.row_bytes // self.vocab_size)
        return max(1, min(num_rows, self.workspace_bytes // narrowest))

    def weight_tile(self, columns: slice) -> torch.Tensor:
        """Rows `columns` of the weight, (C, H) in the product's dtype; valid until the next call."""
        tile = self.weight[columns]
        if tile.dtype == self.dtype:
            return tile
        if self._cast_tile is None or self._cast_tile.shape[0] < tile.shape[0]:
            self._cast_tile = torch.empty(tile.shape, dtype=self.dtype, device=tile.device)
        return self._cast_tile[: tile.shape[0]].copy_(tile)

    def project(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Raw logits of all columns. hidden: (R, H); out: (R, V), both in the product's dtype."""
        if self.weight.dtype == self.dtype:
            return torch.mm(hidden, self.weight.t(), out=out)
        for columns in spans(self.vocab_size, self.tile_columns(hidden.shape[0])):
            torch.mm(hidden, self.weight_tile(columns).t(), out=out[:, columns])
        return out

    def score(self, logits: torch.Tensor, targets: torch.Tensor, outputs: int) -> torch.Tensor:
        """Statistics (6, R) float32 of a block of raw logits (R, V)."""
        return self.kernels.scores(logits, targets, self.bias, *self.transform, outputs)

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


class HeadGradients:
    """Sums the gradients of a head over row blocks: hidden (N, H), weight (V, H), bias (V,), each only if needed."""

    def __init__(self, head: Head, num_rows: int, *, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        device = head.weight.device
        # Partial sums of narrow dtypes would lose what the tiles contribute: accumulate in float32 at least.
        wide = torch.promote_types(head.dtype, torch.float32)
        self.head = head
        self.hidden = torch.zeros(num_rows, head.hidden_size, dtype=wide, device=device) if need_hidden else None
        self.weight: torch.Tensor | None = None
        self._need_weight = need_weight
        self._bias = torch.zeros(head.vocab_size, dtype=wide, device=device) if need_bias else None
        self._wide = wide

    def add(
        self,
        rows: slice,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        coefficients: torch.Tensor,
        *,
        logits: torch.Tensor | None = None,
        consume_logits: bool = False,
        last: bool,
    ) -> None:
        """Adds one row block.

        Args:
            rows: where the block lies in the N rows.
            hidden: (R, H), targets: (R,), lse: (R,), coefficients: (4, R), all of this block.
            logits: (R, V) raw logits if they are still there, else they are computed again tile by tile.
            consume_logits: whether `logits` may be overwritten.
            last: whether no further block follows (a single block needs no wide accumulator for the weight).
        """
        head = self.head
        accumulate = self.weight is not None
        if self._need_weight and self.weight is None:
            dtype = head.weight.dtype if last else self._wide
            self.weight = torch.empty(head.weight.shape, dtype=dtype, device=head.weight.device)
        width = head.tile_columns(hidden.shape[0])
        scratch = None
        if logits is None or not consume_logits:
            scratch = torch.empty(hidden.shape[0], width, dtype=head.dtype, device=hidden.device)
        for columns in spans(head.vocab_size, width):
            tile = scratch if scratch is None else scratch[:, : columns.stop - columns.start]
            source = None if logits is None else logits[:, columns]
            weight = head.weight_tile(columns) if (logits is None or self.hidden is not None) else None
            if source is None:
                source = torch.mm(hidden, weight.t(), out=tile)
            grad = head.grad(source, targets, lse, coefficients, columns, source if tile is None else tile)
            if self.hidden is not None:
                _add_product(self.hidden[rows], grad, weight)
            if self._need_weight:
                _store_product(self.weight[columns], grad.t(), hidden, accumulate)
            if self._bias is not None:
                self._bias[columns] += grad.sum(dim=0, dtype=self._wide)

    def results(
        self, hidden_dtype: torch.dtype, bias_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(hidden, weight, bias) gradients in their tensors' dtypes; an empty tensor where none was needed."""
        device = self.head.weight.device
        weight_dtype = self.head.weight.dtype
        if self._need_weight and self.weight is None:
            self.weight = torch.zeros(self.head.weight.shape, dtype=weight_dtype, device=device)
        pairs = ((self.hidden, hidden_dtype), (self.weight, weight_dtype), (self._bias, bias_dtype))
        hidden, weight, bias = (
            torch.empty(0, dtype=dtype, device=device) if grad is None else grad.to(dtype) for grad, dtype in pairs
        )
        return hidden, weight, bias


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, where total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def _store_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, accumulate: bool) -> None:
    """total (+)= left @ right, where total may have another dtype than the factors."""
    if accumulate:
        _add_product(total, left, right)
    elif total.dtype == left.dtype:
        torch.mm(left, right, out=total)
    else:
        total.copy_(torch.mm(left, right))
