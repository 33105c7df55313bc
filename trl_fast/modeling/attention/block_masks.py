"""Builds FlexAttention's block mask of a row of token trees: which tokens see which, block by block.

A token sees its own segment up to itself and all segments that its segment continues. What continues a segment stands
right behind it, so token q sees token k if and only if k ≤ q < end(k), where end(k) is the end of the last segment
that continues k's own. A sliding window adds that q's position is less than the window after k's.

A block of 128 x 128 pairs that nobody sees is skipped, one in which all pairs are seen needs no mask (FlexAttention,
arXiv 2412.05496, section 3.2).
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.segments import Segment, TreeLengths, segments_of
from trl_fast.ops.device import DeviceFacts

# Tokens of a block: FlexAttention's own default.
BLOCK = 128

_One: TypeAlias = torch.Tensor
Blocks: TypeAlias = tuple[_One, _One, _One, _One, _One, _One, _One, _One]


class BlockMask(NamedTuple):
    """Holds what FlexAttention's kernels are told of a row of T tokens in N blocks, all int32.

    - `blocks`: four pairs of counts (1, 1, N) and numbers of blocks (1, 1, N, N), in the order of torch's `BlockMask`:
      of each block of queries the blocks of keys that are seen in part, then those that are seen wholly; then of each
      block of keys the blocks of queries, likewise.
    - `ends`: (T,), where the tokens that see a token end.
    - `positions`: (T,), a token's position in its sequence.
    - `oldest`: (T,), the lowest position that a token sees.
    """

    blocks: Blocks
    ends: torch.Tensor
    positions: torch.Tensor
    oldest: torch.Tensor


# A row needs one for each kind of its layers, with and without a window. They have 16·N² bytes.
@functools.lru_cache(maxsize=4)
def block_mask(
    trees: tuple[TreeLengths, ...], window: int | None, device: torch.device, facts: DeviceFacts
) -> BlockMask:
    """Builds the mask of a row on the CPU and copies it to a device, for which the host does not wait.

    window: how many tokens a token sees at most, itself among them; None: all. facts: of the device; a simulation must
    not be given the tensors of another one.
    """
    ends, positions = ends_and_positions(trees)
    seen = seen_blocks(trees, window)
    whole = whole_blocks(ends, positions, window)
    found = [
        torch.from_numpy(part[None, None])
        for blocks in (seen & ~whole, whole, (seen & ~whole).T, whole.T)
        for part in _listed(blocks)
    ]
    oldest = np.zeros_like(positions) if window is None else positions - window + 1
    vectors = [torch.from_numpy(vector) for vector in (ends, positions, oldest)]
    tensors = [_of_any_length(copy_to_device(each, device)) for each in (*found, *vectors)]
    return BlockMask(cast(Blocks, tuple(tensors[:-3])), *tensors[-3:])


def _of_any_length(tensor: torch.Tensor) -> torch.Tensor:
    """Marks the dimensions of a vector, or those behind batch and heads, as ones that differ from row to row."""
    for dim in range(0 if tensor.dim() == 1 else 2, tensor.dim()):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def ends_and_positions(trees: tuple[TreeLengths, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns of each of T tokens where those that see it end, and its position in its sequence; (T,) int32 each."""
    segments = segments_of(trees)
    lengths = [segment.length for segment in segments]
    ends = np.repeat(np.array([segment.tree_end for segment in segments], dtype=np.int32), lengths)
    shifts = np.repeat(np.array([segment.offset - segment.start for segment in segments], dtype=np.int32), lengths)
    return ends, np.arange(len(ends), dtype=np.int32) + shifts


def seen_blocks(trees: tuple[TreeLengths, ...], window: int | None) -> np.ndarray:
    """Returns (N, N) bool: whether a token of a block of queries sees one of a block of keys. N is 2 at least, since
    torch compiles for one block apart.
    """
    segments = segments_of(trees)
    count = max(-(-segments[-1].end // BLOCK), 2) if segments else 2
    seen = np.zeros((count, count), dtype=bool)
    for segment in segments:
        path = _path_of(segment, segments)
        for block in range(segment.start // BLOCK, -(-segment.end // BLOCK)):
            first, last = max(segment.start, block * BLOCK), min(segment.end, (block + 1) * BLOCK) - 1
            oldest = 0 if window is None else segment.offset + first - segment.start - window + 1
            for other in path:
                keys = other.start + max(oldest - other.offset, 0), min(other.end - 1, last)
                if keys[0] <= keys[1]:
                    seen[block, keys[0] // BLOCK : keys[1] // BLOCK + 1] = True
    return seen


def _path_of(segment: Segment, segments: tuple[Segment, ...]) -> list[Segment]:
    """Returns a segment and those that it continues."""
    path = [segment]
    while path[-1].parent is not None:
        path.append(segments[path[-1].parent])
    return path


def whole_blocks(ends: np.ndarray, positions: np.ndarray, window: int | None) -> np.ndarray:
    """Returns (N, N) bool: whether all tokens of a block of queries see all of a block of keys.

    ends, positions: as `ends_and_positions` returns them. The last block is never whole if the row ends within it.
    """
    count = max(-(-len(ends) // BLOCK), 2)
    spare = count * BLOCK - len(ends)
    first_end = np.pad(ends, (0, spare)).reshape(count, BLOCK).min(axis=1)
    blocks = np.arange(count)
    whole = (blocks[:, None] > blocks) & ((blocks[:, None] + 1) * BLOCK <= first_end)
    if window is not None:
        padded = np.pad(positions, (0, spare)).reshape(count, BLOCK)
        whole &= padded.max(axis=1)[:, None] - padded.min(axis=1) < window
    return whole


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many entries of each row of (N, N) bool are set, and which: those come first; int32."""
    return blocks.sum(axis=1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)


def visible_pairs(trees: tuple[TreeLengths, ...], window: int | None = None) -> int:
    """Counts the pairs of a token of a row and one that it sees."""
    _, positions = ends_and_positions(trees)
    seen = positions.astype(np.int64) + 1
    return int(seen.sum() if window is None else np.minimum(seen, window).sum())
