"""The head: its weight and transform, the tiles in which its products are taken, and the row kernels on a tile.

The vocabulary is walked tile by tile, and the rows within it. A tile of the weight is thus widened or read once for
all rows, a tile of logits is still in the cache when the row kernels read it, and a tile of the weight's gradient is
finished in one go. Everything that scales with rows times vocabulary lives in one workspace.

On a GPU, logits are float32: products of 16-bit numbers accumulate in float32 and can be written as such. Kept ones
take 16 bits in steps that are fine enough (kept_logits.py), because a gradient needs the very logits that its
log-sum-exp came from: with a log-sum-exp of float32 logits, but bfloat16 logits, the gradient of rows with a confident
prediction was off by a quarter. Gradients of logits have the dtype of the products that they go into.

GEMMs are ATen's. Where the machine has no fast bfloat16 or float16 product (a CPU without AMX or AVX512-BF16), tiles
of the weight are widened to float32 on the way: the product is then one to two orders of magnitude faster, and exact.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..device import device_facts
from ..matmul import SIXTEEN_BITS, logits_dtype
from ..memory_pool import pooled_empty
from ..slices import even_step
from .fused_kernel import fused_tiles
from .kept_logits import CHUNK, PACKED_DTYPE, KeptLogits, KeptTile, num_chunks
from .logit_transform import LogitTransform
from .row_kernels import ROW_KERNELS, RowKernels, row_kernels, row_weights_by_two

# A tile of logits is at most this share of the workspace.
_TILE_SHARE = 4
_MIN_TILE_COLUMNS = 512
_LEAST_WORKSPACE, _MOST_WORKSPACE = 1 << 30, 8 << 30


class TilePolicy(NamedTuple):
    """How a kind of device wants the head cut.

    tile_bytes: of a tile of logits, at most, and of a tile of the widened weight if `weight_tiles`; tile_rows: of a
    tile, at most; row_step: the rows of a block are a multiple of it; whole_rows: kept logits lie in one tile of all
    columns; one_sweep: the unit gradient goes through the tiles that score, so that the weight is read once, and no
    logits are kept for it.
    """

    tile_bytes: int
    tile_rows: int
    row_step: int
    weight_tiles: bool
    whole_rows: bool
    one_sweep: bool


# Both kinds of tile stay in a CPU's cache; larger ones were no faster. A GPU's products are made of 128 or 256 rows.
CPU_TILES = TilePolicy(32 << 20, 2048, 1, weight_tiles=True, whole_rows=False, one_sweep=True)
GPU_TILES = TilePolicy(256 << 20, 1 << 30, 256, weight_tiles=False, whole_rows=True, one_sweep=False)


def tile_policy(device: torch.device) -> TilePolicy:
    """The policy of a device."""
    return CPU_TILES if device_facts(device).kind == "cpu" else GPU_TILES


def workspace_of(asked: int | None, device: torch.device) -> int:
    """Bytes of workspace: what was asked for, else 1 GiB on a CPU and up to a sixteenth of a GPU's memory.

    The more rows of logits fit at once, the less often the weight's gradient is read and written. On a GPU it is a
    power of two times 1 GiB, at most 8 GiB, and at most a quarter of what is free, but always 1 GiB. Other blocks add
    up gradients in another order: a run that must give the same bits beside other processes sets it.

    Raises:
        ValueError: more was asked for than the GPU has.
    """
    if device.type != "cuda":
        return _LEAST_WORKSPACE if asked is None else asked
    free, total = torch.cuda.mem_get_info(device)
    if asked is not None:
        if asked > total:
            raise ValueError(f"workspace_bytes: {asked} bytes are more than the {total} of {device}; ask for less")
        return asked
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return default_workspace(free, total)


def default_workspace(free: int, total: int) -> int:
    """The default workspace of a GPU with so many bytes of memory, so many of which are free."""
    size = _LEAST_WORKSPACE
    while size < _MOST_WORKSPACE and 2 * size <= min(total // 16, free // 4):
        size *= 2
    return size


def row_bytes(vocab_size: int, dtype: torch.dtype, kernels: RowKernels) -> int:
    """Bytes of workspace that one row of logits takes, temporaries of the row kernels included."""
    return vocab_size * (dtype.itemsize + kernels.bytes_per_element)


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
        self.kernels = row_kernels(backend, weight.device)
        self.vocab_size, self.hidden_size = weight.shape
        self.policy = tile_policy(weight.device)
        self.logits_dtype = logits_dtype(dtype, weight.device)
        self.row_bytes = row_bytes(self.vocab_size, self.logits_dtype, self.kernels)
        self.workspace_bytes = workspace_bytes
        self._cast_weight: torch.Tensor | None = None
        # The fused kernel's configuration, if it is to score here.
        self.fused = None
        if self.policy.whole_rows and self.packs:
            self.fused = fused_tiles(backend, self.hidden_size, dtype, weight.device)
        rows_per_block(1, self.row_bytes, workspace_bytes)

    @property
    def chunk(self) -> int:
        """Columns of a chunk of packed logits."""
        return CHUNK if self.fused is None else self.fused.columns

    @property
    def packs(self) -> bool:
        """Whether kept logits are packed: float32 products of 16-bit numbers, which take more room than they know.

        Not with a softcap, whose derivative would be off by more than a probability where logits are near the cap.
        """
        sixteen = self.dtype in SIXTEEN_BITS or self.weight.dtype in SIXTEEN_BITS
        can = self.kernels.grad_packed is not None and not self.transform.softcap
        return can and sixteen and self.logits_dtype == torch.float32

    @property
    def narrow_gradients(self) -> bool:
        """Whether gradients of logits are narrower than logits, and so cannot take their place."""
        return self.logits_dtype != self.dtype

    def kept_rows(self, num_rows: int, *, raw: bool = False) -> int:
        """How many whole rows of logits the workspace holds with a tile beside them. raw: never packed."""
        row_bytes = self.row_bytes
        if self.packs and not raw:
            row_bytes = self.vocab_size * PACKED_DTYPE.itemsize + num_chunks(self.vocab_size, self.chunk) * 4
        tile_bytes = self.workspace_bytes // _TILE_SHARE
        if self.policy.whole_rows:
            tile_bytes = min(tile_bytes, self.policy.tile_bytes)
        rows, step = (self.workspace_bytes - tile_bytes) // row_bytes, self.policy.row_step
        return num_rows if rows >= num_rows else rows if rows < step else rows // step * step

    def block_rows(self, num_rows: int, *, raw: bool = False) -> int:
        """The rows of a block, for ops that go block by block in equal parts: at least one, if there are any."""
        most = max(1, self.kept_rows(num_rows, raw=raw))
        step = self.policy.row_step if most >= self.policy.row_step else 1
        even = even_step(num_rows, -(-most // step) * step)
        return min(num_rows, -(-even // step) * step)

    def tiling(self, num_rows: int, kept_logits: KeptLogits | None = None, *, gradients: bool = False) -> Tiling:
        """The tiles for `num_rows` rows: within a share of the workspace and what the device wants.

        kept_logits: their tiles decide the columns on a CPU if there are any; gradients: a tile of them, in the
        product's dtype, stands beside that of the logits. Each of its tiles costs a sum of hidden states that is read
        and written, so it gets all that kept logits leave of the workspace.
        """
        policy = self.policy
        element = self.row_bytes // self.vocab_size
        budget = min(self.workspace_bytes // _TILE_SHARE, policy.tile_bytes)
        if gradients and self.narrow_gradients:
            element += self.dtype.itemsize
            budget = max(budget, self.workspace_bytes - (0 if kept_logits is None else kept_logits.nbytes))
        rows, columns = even_step(num_rows, policy.tile_rows), self.vocab_size
        if policy.weight_tiles:
            columns = min(columns, policy.tile_bytes // (self.hidden_size * self.dtype.itemsize))
        step, least = (CHUNK, CHUNK) if policy.whole_rows else (64, _MIN_TILE_COLUMNS)
        columns = max(least, min(columns, budget // max(1, rows * element)) // step * step)
        columns = min(self.vocab_size, columns)
        if kept_logits is not None and kept_logits.num_rows and not policy.whole_rows:
            columns = kept_logits.columns
        return Tiling(max(1, min(rows, budget // (columns * element))), columns)

    def empty_logits(self, num_kept: int, num_rows: int, *, raw: bool = False) -> KeptLogits:
        """Room for the logits of `num_kept` rows, in tiles as they are for `num_rows` rows in all. raw: not packed."""
        dtype = PACKED_DTYPE if self.packs and not raw else self.logits_dtype
        columns = self.kept_columns(num_rows)
        return KeptLogits.empty(num_kept, self.vocab_size, columns, dtype, self.weight.device, self.chunk)

    def kept_columns(self, num_rows: int) -> int:
        """Columns of a tile of kept logits where `num_rows` rows are scored in all."""
        return self.vocab_size if self.policy.whole_rows else self.tiling(num_rows).columns

    def scratch(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for tiles of up to this size."""
        return pooled_empty((rows, columns), dtype, self.weight.device)

    def weight_tile(self, columns: slice) -> torch.Tensor:
        """Rows `columns` of the weight, (C, H) in the product's dtype; on a CPU valid until the next call."""
        tile = self.weight[columns]
        if tile.dtype == self.dtype:
            return tile
        if not self.policy.weight_tiles:
            if self._cast_weight is None:
                self._cast_weight = self.weight.to(self.dtype)
            return self._cast_weight[columns]
        if self._cast_weight is None or self._cast_weight.shape[0] < tile.shape[0]:
            self._cast_weight = pooled_empty(tile.shape, self.dtype, tile.device)
        return self._cast_weight[: tile.shape[0]].copy_(tile)

    def _bias_tile(self, columns: slice) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def score(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        columns: slice,
        outputs: int,
        state: torch.Tensor,
        keep: KeptTile | None = None,
    ) -> None:
        """Adds raw logits (R, C) of the given columns to the rows' state (7, R); `keep` takes them packed."""
        given = (logits, targets, self._bias_tile(columns))
        if keep is None:
            self.kernels.scores(*given, *self.transform, outputs, columns.start, state)
        else:
            scale, _, inv_temperature = self.transform
            self.kernels.scores_packed(*given, scale, inv_temperature, outputs, columns.start, state, *keep)

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
        packed: KeptTile,
        index: torch.Tensor | None,
        targets: torch.Tensor,
        lse: torch.Tensor,
        coefficients: torch.Tensor,
        columns: slice,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The same of rows `index` (R,), None for all in order, of packed logits (K, C); `out` may be the words."""
        scale, _, inv_temperature = self.transform
        words, tops = packed
        given = (words, index, targets, scale, inv_temperature, lse, coefficients, columns.start, out, tops)
        if self.fused is None:
            self.kernels.grad_packed(*given)
        else:  # whose chunks are no others' but Triton's
            ROW_KERNELS["triton"].grad_packed(*given, self.chunk)
        return out
