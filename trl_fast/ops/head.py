"""The head: its weight and transform, the tiles in which its products are taken, and the row kernels on a tile.

The vocabulary is walked tile by tile, and the rows within it. A tile of the weight is thus widened or read once for
all rows, a tile of logits is still in the cache when the row kernels read it, and a tile of the weight's gradient is
finished in one go. Everything that scales with rows times vocabulary lives in one workspace.

On a GPU, logits are float32: products of 16-bit numbers accumulate in float32 and can be written as such. All logits
are, kept ones too, because a gradient needs the very logits that its log-sum-exp came from: with a log-sum-exp of
float32 logits, but bfloat16 logits, the gradient of rows with a confident prediction was off by a quarter. Gradients
of logits have the dtype of the products that they go into.

GEMMs are ATen's. Where the machine has no fast bfloat16 or float16 product (a CPU without AMX or AVX512-BF16), tiles
of the weight are widened to float32 on the way: the product is then one to two orders of magnitude faster, and exact.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .kept_logits import PACKED_DTYPE, KeptLogits, packed_columns
from .large_tensors import large_empty
from .products import logits_dtype
from .rows import ROW_KERNELS, row_weights_by_two
from .spans import even_step
from .transform import LogitTransform

DEFAULT_WORKSPACE_BYTES = 1 << 30
# A tile of logits is at most this share of the workspace.
_TILE_SHARE = 4
# On a CPU the tiles of logits and of widened weight each stay below this; larger ones were no faster.
_CACHE_BYTES = 32 << 20
_CPU_TILE_ROWS = 2048
_MIN_TILE_COLUMNS = 512


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

    def _bias_tile(self, columns: slice) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[columns]

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
        given = (logits, targets, self._bias_tile(columns))
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
        weights = self.kernels.weights or functools.partial(row_weights_by_two, self.kernels)
        weights(logits, targets, self._bias_tile(columns), *self.transform, outputs, columns.start, state, out)
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
        given = (logits, targets, self._bias_tile(columns), *self.transform)
        self.kernels.grad(*given, lse, coefficients, columns.start, out)
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
