"""Plans how the head is swept: its tiles, the rows whose logits are kept, and the dtypes, as one value, `HeadPlan`.

The vocabulary is walked tile by tile, and the rows within it. A tile of the weight is thus cast or read once for
all rows, a tile of logits is still in the cache when the row kernels read it, and a tile of the weight's gradient is
finished in one go. Everything that scales with rows times vocabulary lives in one workspace.

On a GPU, logits are float32: products of 16-bit numbers accumulate in float32 and can be written as such. Kept ones
take 16 bits in steps that are fine enough (kept_logits.py), because a gradient needs the very logits that its
log-sum-exp came from: with a log-sum-exp of float32 logits, but bfloat16 logits, the gradient of rows with a confident
prediction was off by a quarter. Gradients of logits have the dtype of the products that they go into.

GEMMs are ATen's. Where the machine has no fast bfloat16 or float16 product (a CPU without AMX or AVX512-BF16), tiles
of the weight are cast to float32 on the way: the product is then one to two orders of magnitude faster, and exact. A
GPU casts a float32 weight to the 16 bits of its products, as a whole where the workspace has room for that, else slice
by slice of the vocabulary.

`plan_head` is a pure function of shapes, dtypes, memory, kernels and facts about the device; the sweeps only follow
the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..device import DeviceFacts
from ..matmul import SIXTEEN_BITS
from .kept_logits import CHUNK, PACKED_DTYPE, ROW_ALIGNMENT, num_chunks
from .vocabulary_shard import VocabularyShard

if TYPE_CHECKING:
    from trl_fast.kernels.linear_scores import Tiles

    from .row_kernels import RowKernels

HEAD_GRADS = ("exact", "sparse")
DEFAULT_SPARSE_THRESHOLD = 2.0**-14

# What of the logits a forward sweep keeps: NOTHING; LOGITS, those of the first rows, for a backward pass that comes
# later; UNIT_GRADIENT, d logprob / d hidden instead; BLOCKS, those of a block of rows until its gradient is computed
# within the sweep; GROUPS, the same in the largest blocks; RAW_BLOCKS, the same as BLOCKS, but never packed.
NOTHING, LOGITS, UNIT_GRADIENT, BLOCKS, GROUPS, RAW_BLOCKS = range(6)

# A tile of logits is at most this share of the workspace.
_TILE_SHARE = 4
# A GPU casts a weight once if that takes at most one part in so many of the workspace; if not, a slice of it has a
# tile's share.
_CAST_SHARE = 2
_MIN_TILE_COLUMNS = 512
_LEAST_WORKSPACE, _MOST_WORKSPACE = 1 << 30, 8 << 30


@dataclass(frozen=True)
class HeadOptions:
    """Holds a user's settings of the head, from a trainer's config to the ops, whose arguments have these names.

    - `backend`: force "cuda", "triton", "cpp" or "torch"; None takes the best that can serve.
    - `workspace_bytes`: limit of the memory that grows with N · V; None: see `workspace_of`.
    - `head_grad`: "exact", or "sparse" for an unbiased estimate of the gradient (see sparse_gradient.py).
    - `sparse_threshold`: smaller probabilities are sampled.
    """

    backend: str | None = None
    workspace_bytes: int | None = None
    head_grad: str = "exact"
    sparse_threshold: float = DEFAULT_SPARSE_THRESHOLD

    def check(self, device: torch.device) -> None:
        """Checks the settings for a head on `device`.

        Raises:
            ValueError: the kind of gradient is unknown or does not exist there, or the threshold is not in (0, 1).
        """
        if self.head_grad not in HEAD_GRADS:
            raise ValueError(f"head_grad: unknown value {self.head_grad!r}; expected one of {HEAD_GRADS}")
        if self.head_grad == "sparse" and device.type != "cpu":
            raise ValueError(
                f"head_grad='sparse' is for a CPU only, not for {device.type}, where gathering a row of the weight "
                "and one of the hidden states for every entry takes as long as the products that it spares "
                "(docs/benchmarks.md has the arithmetic); use head_grad='exact'"
            )
        if not 0.0 < self.sparse_threshold < 1.0:
            raise ValueError(f"sparse_threshold must lie between 0 and 1, got {self.sparse_threshold!r}")

    def workspace_on(self, device: torch.device, facts: DeviceFacts, shard: VocabularyShard | None = None) -> int:
        """Checks the settings, and returns the bytes of workspace of a head on a device with these facts.

        Processes that share the vocabulary (shard) do not look at what is free: they cut their rows alike.

        Raises:
            ValueError: as in `check` and `workspace_of`.
        """
        self.check(device)
        asked = self.workspace_bytes
        if asked is None and shard is not None:
            asked = _LEAST_WORKSPACE
        return workspace_of(asked, device, facts)


class TilePolicy(NamedTuple):
    """Says how a kind of device wants the head cut.

    tile_bytes: of a tile of logits, at most; weight_bytes: of a tile of the weight, if `weight_tiles`; tile_rows: of a
    tile of gradients, at most; scored_rows: of a tile that is scored, at most; row_step: the rows of such a tile are a
    multiple of it, if it has so many; least_tiles: so many of them have their logits kept at once, if that leaves
    tiles of row_step rows; whole_rows: kept logits lie in one tile of all columns; one_sweep: the unit gradient goes
    through the tiles that score, so that the weight is read once, and no logits are kept for it.
    """

    tile_bytes: int
    weight_bytes: int
    tile_rows: int
    scored_rows: int
    row_step: int
    least_tiles: int
    weight_tiles: bool
    whole_rows: bool
    one_sweep: bool


# A tile of logits stays in a CPU's cache, beside what its products read and write. Its libraries pack a tile of the
# weight for every tile of rows: 15% of a product of 328 rows, 5% of one of 1024. A GPU's products are made of 128 or
# 256 rows.
CPU_TILES = TilePolicy(8 << 20, 32 << 20, 2048, 1024, 4, 2, weight_tiles=True, whole_rows=False, one_sweep=True)
GPU_TILES = TilePolicy(1 << 28, 1 << 28, 1 << 30, 2048, 256, 4, weight_tiles=False, whole_rows=True, one_sweep=False)
# Rows whose first numbers are a multiple of so many bytes apart share few places of a CPU's cache, and the weight's
# gradient reads columns: a head trained through tiles of 2048 float32 columns took 8% longer than through 1984.
_CROWDED_STRIDE = 4096


def workspace_of(asked: int | None, device: torch.device, facts: DeviceFacts) -> int:
    """Returns the bytes of workspace: what was asked for, else 1 GiB on a CPU and up to a sixteenth of a GPU's memory.

    The more rows of logits fit at once, the less often the weight's gradient is read and written. On a GPU it is a
    power of two times 1 GiB, at most 8 GiB, and at most a quarter of what is free, but always 1 GiB. Other blocks add
    up gradients in another order: a run that must give the same bits beside other processes sets it.

    Raises:
        ValueError: more was asked for than the GPU has.
    """
    memory = facts.read_memory() if facts.kind == "cuda" else None
    if memory is None:
        return _LEAST_WORKSPACE if asked is None else asked
    if asked is None:
        return default_workspace(memory.free, memory.total)
    if asked > memory.total:
        raise ValueError(f"workspace_bytes: {asked} bytes are more than the {memory.total} of {device}; ask for less")
    return asked


def default_workspace(free: int, total: int) -> int:
    """Returns the default workspace of a GPU with so many bytes of memory, so many of which are free."""
    size = _LEAST_WORKSPACE
    while size < _MOST_WORKSPACE and 2 * size <= min(total // 16, free // 4):
        size *= 2
    return size


def even_step(total: int, limit: int) -> int:
    """Returns the step of at most `limit` that covers `total` in equal parts: a small last one is a slow product."""
    parts = max(1, -(-total // limit))
    return -(-total // parts)


def round_up(number: int, step: int) -> int:
    """Returns the smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def slices(start: int, stop: int, step: int) -> list[slice]:
    """Returns consecutive slices of at most `step`, at least 1, that cover range(start, stop)."""
    return [slice(first, min(first + step, stop)) for first in range(start, stop, max(step, 1))]


def group_slices(sizes: Sequence[int], room: int, step: int = 1) -> list[slice]:
    """Returns consecutive slices of whole groups that cover range(sum(sizes)).

    Each is one group, or as many as have `room` rows, with the rest of the tile of `step` rows in which they end.
    """
    found = []
    start = end = 0
    total = sum(sizes)
    for size in sizes:
        if end > start and min(total, round_up(end + size, step)) - start > room:
            found.append(slice(start, end))
            start = end
        end += size
    return [*found, slice(start, end)] if end > start else found


class SweepTiles(NamedTuple):
    """Holds the tiles of a sweep: slices of the rows, those of kept logits first, and of the columns.

    num_rows, num_columns: of the largest tile.
    """

    num_rows: int
    num_columns: int
    rows: list[slice]
    columns: list[slice]


class TileLimits(NamedTuple):
    """Holds the limits of a tile's size, and cuts rows and columns into tiles.

    weight_columns: columns of a tile of the weight, at most; product_bytes: bytes of a factor of the products;
    logit_bytes: bytes of the workspace that a logit takes, temporaries of the row kernels included; narrow_gradients:
    whether gradients of logits have another dtype than the logits, and so cannot take their place; all_tiles: whether
    every tile is computed. A simulation computes only the first two tiles and the last one, which take as much memory
    as all.
    """

    vocab_size: int
    weight_columns: int
    product_bytes: int
    logit_bytes: int
    narrow_gradients: bool
    workspace_bytes: int
    policy: TilePolicy
    all_tiles: bool

    @property
    def tile_bytes(self) -> int:
        """Returns the bytes of the workspace that a tile of logits may take."""
        return self.workspace_bytes // _TILE_SHARE

    def tile_shape(
        self, num_rows: int, *, gradients: bool = False, kept_bytes: int = 0, kept_columns: int | None = None
    ) -> tuple[int, int]:
        """Returns rows and columns of a tile: within a share of the workspace and what the device wants.

        gradients: a tile of them, in the product's dtype, stands beside that of the logits. Each of its tiles costs a
        sum of hidden states that is read and written, so it gets all that kept logits (kept_bytes) leave of the
        workspace. kept_columns: of a tile of kept logits, which the columns have to follow.
        """
        policy = self.policy
        element = self.logit_bytes
        budget = min(self.tile_bytes, policy.tile_bytes)
        if gradients and self.narrow_gradients:
            element += self.product_bytes
            budget = max(budget, self.workspace_bytes - kept_bytes)
        rows, columns = even_step(num_rows, policy.tile_rows), self.weight_columns
        step, least = (CHUNK, CHUNK) if policy.whole_rows else (64, _MIN_TILE_COLUMNS)
        columns = max(least, min(columns, budget // max(1, rows * element)) // step * step)
        crowded = columns * self.product_bytes % _CROWDED_STRIDE == 0
        if crowded and least < columns < self.vocab_size and not policy.whole_rows:
            columns -= step
        columns = min(self.vocab_size, columns) if kept_columns is None else kept_columns
        return max(1, min(rows, budget // (columns * element))), columns

    def cut(self, num_rows: int, kept_rows: int, tile_shape: tuple[int, int]) -> SweepTiles:
        """Cuts `num_rows` rows, of which the first `kept_rows` are kept, and all columns into tiles."""
        height, width = tile_shape
        rows = self.computed(slices(0, kept_rows, height)) + self.computed(slices(kept_rows, num_rows, height))
        return SweepTiles(height, width, rows, self.computed(slices(0, self.vocab_size, width)))

    def computed(self, tiles: list[slice]) -> list[slice]:
        """Returns the tiles that are to be computed."""
        return tiles if self.all_tiles or len(tiles) < 3 else [*tiles[:2], tiles[-1]]


@dataclass(frozen=True)
class HeadPlan:
    """Says how a head is swept.

    - `vocab_size`: V; `hidden_size`: H.
    - `product_dtype`: of the factors of every product; `logits_dtype`: of logits as they are computed; `sum_dtype`: of
      what is summed over tiles, float32 at least, because partial sums of 16 bits would lose what tiles contribute.
    - `casts_weight`: whether tiles of the weight are cast to `product_dtype`; `casts_whole`: or a weight at once.
    - `packed`: whether kept logits are packed; `chunk`: columns of a chunk of packed ones.
    - `fused`: the tiles of the fused kernel; None where a matrix product and a row kernel score instead.
    - `block_rows`: rows of a block; a forward sweep goes block by block.
    - `kept_rows`: rows of a block, from its first on, whose logits are kept; `kept_columns`: columns of a tile of kept
      logits; `kept_shape`: the shape of `KeptLogits.values`.
    - `scoring`: the tiles that score a whole block; `limits`: cuts other blocks into tiles. Blocks and kept rows end
      where a tile does, and tiles do not depend on what is kept: whatever the pass, a row is in the same product.
    """

    vocab_size: int
    hidden_size: int
    product_dtype: torch.dtype
    logits_dtype: torch.dtype
    sum_dtype: torch.dtype
    casts_weight: bool
    packed: bool
    chunk: int
    fused: Tiles | None
    block_rows: int
    kept_rows: int
    kept_columns: int
    kept_shape: tuple[int, int, int]
    scoring: SweepTiles
    limits: TileLimits

    @property
    def casts_whole(self) -> bool:
        """Tells whether a weight that is cast is cast once, for all tiles."""
        return not self.limits.policy.weight_tiles and self.limits.weight_columns == self.vocab_size

    @property
    def weight_slices(self) -> list[slice]:
        """Returns the slices of the vocabulary in which a kernel that scores all columns is given the weight."""
        return slices(0, self.vocab_size, self.limits.weight_columns)

    def blocks(self, num_rows: int) -> list[slice]:
        """Returns the blocks of `num_rows` rows; in a simulation only some of them, as of tiles."""
        return self.limits.computed(slices(0, num_rows, self.block_rows))

    def group_blocks(self, sizes: Sequence[int]) -> list[slice]:
        """Returns blocks of groups of these sizes: of one group, or of as many as have all logits kept."""
        return group_slices(sizes, self.kept_rows, max(self.scoring.num_rows, 1))

    def tile_start(self, row: int) -> int:
        """Returns the first row of the tile in which a row is scored."""
        return row - row % max(self.scoring.num_rows, 1)

    def tile_stop(self, row: int) -> int:
        """Returns where the tile ends that a block which ends before `row` ends in."""
        return round_up(row, max(self.scoring.num_rows, 1))

    def narrowed(self, vocab_size: int) -> HeadPlan:
        """Returns the plan of a head of fewer columns, whose rows are cut as this one's are."""
        limits = self.limits._replace(vocab_size=vocab_size)
        columns = vocab_size if limits.policy.whole_rows else self.kept_columns
        shape = self.scoring.num_rows, self.scoring.num_columns
        return replace(
            self,
            vocab_size=vocab_size,
            kept_columns=columns,
            kept_shape=kept_shape(self.kept_rows, vocab_size, columns),
            scoring=limits.cut(self.block_rows, self.kept_rows, shape),
            limits=limits,
        )

    def scoring_tiles(self, num_rows: int, kept_rows: int) -> SweepTiles:
        """Returns the tiles that score `num_rows` rows from a tile's first row on, of which the first are kept."""
        return self.limits.cut(num_rows, kept_rows, (self.scoring.num_rows, self.scoring.num_columns))

    def gradient_tiles(
        self, num_rows: int, kept_rows: int, kept_bytes: int, most_columns: int | None = None, *, in_place: bool
    ) -> SweepTiles:
        """Returns the tiles in which gradients of logits are computed, for blocks of at most `num_rows` rows.

        kept_rows, kept_bytes: of logits that are kept meanwhile; most_columns: of a tile, about, where the device lets
        them be chosen; in_place: whether all gradients take the place of logits. These need no scratch memory, so that
        on a GPU one tile has all columns, or a cast slice of them.
        """
        limits = self.limits
        if in_place and limits.policy.whole_rows and most_columns is None:
            return limits.cut(num_rows, 0, (num_rows, limits.weight_columns))
        follows = self.kept_columns if kept_rows and not limits.policy.whole_rows else None
        height, width = limits.tile_shape(num_rows, gradients=True, kept_bytes=kept_bytes, kept_columns=follows)
        if most_columns is not None and follows is None:
            width = min(width, max(CHUNK, most_columns // CHUNK * CHUNK))
        return limits.cut(num_rows, 0, (height, width))


def row_bytes(vocab_size: int, dtype: torch.dtype, kernels: RowKernels) -> int:
    """Returns the bytes of workspace that a row of logits takes, temporaries of the row kernels included."""
    return vocab_size * (dtype.itemsize + kernels.bytes_per_element)


def plan_head(
    num_rows: int,
    weight_shape: Sequence[int],
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    capped: bool,
    keep: int,
    kernels: RowKernels,
    workspace_bytes: int,
    facts: DeviceFacts,
    find_fused: Callable[[torch.dtype], Tiles | None] = lambda dtype: None,
) -> HeadPlan:
    """Plans the sweeps of a head over `num_rows` rows.

    Args:
        weight_shape: (V, H); weight_dtype: its dtype; dtype: that of the hidden states.
        capped: whether logits have a softcap. They are not packed then: near the cap its derivative would be off.
        keep: what of the logits is kept, NOTHING to RAW_BLOCKS above.
        kernels: the backend's row kernels.
        find_fused: tells the tiles of the fused kernel for products of a dtype, None if it does not serve.

    Raises:
        ValueError: the workspace holds no row of logits.
    """
    vocab_size, hidden_size = weight_shape
    policy = CPU_TILES if facts.kind == "cpu" else GPU_TILES
    product = facts.product_dtypes.get(dtype, dtype)
    sums = torch.promote_types(product, torch.float32)
    logits = sums if facts.kind == "cuda" else product
    least = row_bytes(vocab_size, logits, kernels)
    if workspace_bytes < least:
        raise ValueError(f"workspace_bytes: {workspace_bytes} bytes hold no row of logits; a row takes {least} bytes")
    packs = (fuses := _fits_words(product, weight_dtype, logits, kernels)) and not capped
    columns, workspace_bytes = _weight_tile(weight_shape, product, weight_dtype, workspace_bytes, least, policy)
    fused = find_fused(product) if fuses and policy.whole_rows else None
    chunk, packed = fused.columns if fused else CHUNK, packs and keep != RAW_BLOCKS
    packed_bytes = vocab_size * PACKED_DTYPE.itemsize + num_chunks(vocab_size, chunk) * 4 if packs else least
    limits = TileLimits(
        *(vocab_size, columns, product.itemsize, least // vocab_size),
        *(logits != product, workspace_bytes, policy, not facts.first_tiles_only),
    )
    # Nothing here depends on `keep`, so that a row is in the same product whatever the pass.
    shape = limits.tile_shape(_scored_rows(num_rows, _room(packed_bytes, workspace_bytes, policy), policy))
    room = _room(packed_bytes if packed else least, workspace_bytes, policy)
    block_rows, kept_rows = _block(num_rows, keep, room, shape[0], policy)
    kept_columns = vocab_size if policy.whole_rows else shape[1]
    return HeadPlan(
        *(vocab_size, hidden_size, product, logits, sums),
        casts_weight=weight_dtype != product,
        packed=packed,
        chunk=chunk,
        fused=fused,
        block_rows=block_rows,
        kept_rows=kept_rows,
        kept_columns=kept_columns,
        kept_shape=kept_shape(kept_rows, vocab_size, kept_columns),
        scoring=limits.cut(block_rows, kept_rows, shape),
        limits=limits,
    )


def _weight_tile(
    weight_shape: Sequence[int],
    product: torch.dtype,
    weight_dtype: torch.dtype,
    workspace_bytes: int,
    least: int,
    policy: TilePolicy,
) -> tuple[int, int]:
    """Returns the columns of a tile of the weight (V, H), at most, and what a GPU's copy leaves of the workspace.

    product: dtype of the products' factors; least: bytes that are always left.
    """
    vocab_size, hidden_size = weight_shape
    column_bytes = max(1, hidden_size * product.itemsize)
    if policy.weight_tiles:
        return min(vocab_size, policy.weight_bytes // column_bytes), workspace_bytes
    if weight_dtype == product:
        return vocab_size, workspace_bytes
    columns = vocab_size
    if vocab_size * column_bytes > workspace_bytes // _CAST_SHARE:
        limit = max(CHUNK, workspace_bytes // _TILE_SHARE // column_bytes // CHUNK * CHUNK)
        columns = min(vocab_size, round_up(even_step(vocab_size, limit), CHUNK))
    return columns, max(least, workspace_bytes - columns * column_bytes)


def _fits_words(product: torch.dtype, weight_dtype: torch.dtype, logits: torch.dtype, kernels: RowKernels) -> bool:
    """Tells whether kept logits can be packed: float32 products of 16-bit numbers take more room than they know."""
    sixteen_bits = product in SIXTEEN_BITS or weight_dtype in SIXTEEN_BITS
    return kernels.grad_packed is not None and sixteen_bits and logits == torch.float32


def kept_shape(num_rows: int, vocab_size: int, columns: int) -> tuple[int, int, int]:
    """Returns the shape of KeptLogits' values for so many rows, in tiles of `columns`."""
    num_tiles = -(-vocab_size // columns)
    width = columns if num_tiles > 1 else -(-columns // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return num_tiles, num_rows, width


def _room(row_bytes: int, workspace_bytes: int, policy: TilePolicy) -> int:
    """Returns how many rows of logits, of `row_bytes` each, are kept at once; a tile stands beside them."""
    tile_bytes = workspace_bytes // _TILE_SHARE
    if policy.whole_rows:
        tile_bytes = min(tile_bytes, policy.tile_bytes)
    return (workspace_bytes - tile_bytes) // row_bytes


def _scored_rows(num_rows: int, room: int, policy: TilePolicy) -> int:
    """Returns the rows of a tile that is scored; room: of the rows whose logits are kept at once.

    A CPU cuts rows that are all kept into even tiles. Else blocks are of whole tiles, and a block of groups may need
    room for a tile more: a tile is a part of the room.
    """
    step = policy.row_step
    if num_rows <= room and not policy.whole_rows:
        return min(num_rows, round_up(even_step(num_rows, policy.scored_rows), step))
    tiles = max(policy.least_tiles, -(-room // policy.scored_rows))
    rows = max(1, room // tiles, min(room, step))
    return min(num_rows, rows if rows < step else rows // step * step)


def _block(num_rows: int, keep: int, room: int, step: int, policy: TilePolicy) -> tuple[int, int]:
    """Returns the rows of a block, and of how many of them logits are kept; step: the rows of a tile."""
    if keep == NOTHING or keep == UNIT_GRADIENT and policy.one_sweep:
        return num_rows, 0
    fitting = num_rows if room >= num_rows else room // step * step
    if keep == LOGITS:
        return num_rows, fitting
    if keep == GROUPS:
        # Groups are of any size: the more room, the more of them stay whole.
        return fitting, fitting
    # Equal parts, of whole tiles.
    rows = min(num_rows, round_up(even_step(num_rows, max(fitting, step)), step))
    return rows, rows
