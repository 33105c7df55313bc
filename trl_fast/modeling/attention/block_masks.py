"""Builds FlexAttention's block mask of a row of token trees: which tokens see which, block by block.

A token sees its own segment up to itself and all segments that its segment continues. What continues a segment stands
right behind it, so token q sees token k if and only if k ≤ q < end(k), where end(k) is the end of the last segment
that continues k's own. A sliding window adds that q's position is less than the window after k's. In a run, whose
tokens see each other both ways, k ≤ q becomes k ≤ last(q), the last token of the run.

A block of 128 x 128 pairs that nobody sees is skipped, one in which all pairs are seen needs no mask (FlexAttention,
arXiv 2412.05496, section 3.2).
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.segments import Segment, segments_of
from trl_fast.ops.device import DeviceFacts

from .row_attention import RowMask

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
    - `last`: (T,), the last token that a token sees: itself, or the last one of its run.
    """

    blocks: Blocks
    ends: torch.Tensor
    positions: torch.Tensor
    oldest: torch.Tensor
    last: torch.Tensor


# A row needs one for each kind of its layers, with and without a window. They have 16·N² bytes.
@functools.lru_cache(maxsize=4)
def block_mask(mask: RowMask, device: torch.device, facts: DeviceFacts) -> BlockMask:
    """Builds the mask of a row on the CPU and copies it to a device, for which the host does not wait.

    facts: of the device; a simulation must not be given the tensors of another one.
    """
    of_tokens = token_bounds(mask)
    seen, whole = seen_blocks(mask), whole_blocks(of_tokens)
    found = [
        torch.from_numpy(part[None, None])
        for blocks in (seen & ~whole, whole, (seen & ~whole).T, whole.T)
        for part in _listed(blocks)
    ]
    vectors = map(torch.from_numpy, of_tokens)
    tensors = [_of_any_length(copy_to_device(each, device)) for each in (*found, *vectors)]
    return BlockMask(cast(Blocks, tuple(tensors[: len(found)])), *tensors[len(found) :])


def _of_any_length(tensor: torch.Tensor) -> torch.Tensor:
    """Marks the dimensions of a vector, or those behind batch and heads, as ones that differ from row to row."""
    for dim in range(0 if tensor.dim() == 1 else 2, tensor.dim()):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


class TokenBounds(NamedTuple):
    """Holds the vectors of `BlockMask`, (T,) int32 each, in its order."""

    ends: np.ndarray
    positions: np.ndarray
    oldest: np.ndarray
    last: np.ndarray


def token_bounds(mask: RowMask) -> TokenBounds:
    """Returns of each of T tokens which tokens it sees, and which see it."""
    segments = segments_of(mask.trees)
    lengths = [segment.length for segment in segments]
    ends = np.repeat(np.array([segment.tree_end for segment in segments], dtype=np.int32), lengths)
    shifts = np.repeat(np.array([segment.offset - segment.start for segment in segments], dtype=np.int32), lengths)
    last = np.arange(len(ends), dtype=np.int32)
    positions = last + shifts
    oldest = np.zeros_like(positions) if mask.window is None else np.maximum(positions - mask.window + 1, 0)
    for start, end in mask.runs:
        last[start:end] = end - 1
        if mask.whole_runs:
            oldest[start:end] = np.minimum(oldest[start:end], positions[start])
    return TokenBounds(ends, positions, oldest, last)


def seen_blocks(mask: RowMask) -> np.ndarray:
    """Returns (N, N) bool: whether a token of a block of queries sees one of a block of keys. N is 2 at least, since
    torch compiles for one block apart.
    """
    segments, bounds = segments_of(mask.trees), token_bounds(mask)
    count = max(-(-segments[-1].end // BLOCK), 2) if segments else 2
    seen = np.zeros((count, count), dtype=bool)
    for segment in (one for one in segments if one.length):
        path = _path_of(segment, segments)
        for block in range(segment.start // BLOCK, -(-segment.end // BLOCK)):
            queries = slice(max(segment.start, block * BLOCK), min(segment.end, (block + 1) * BLOCK))
            oldest, last = bounds.oldest[queries].min(), bounds.last[queries].max()
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


def whole_blocks(bounds: TokenBounds) -> np.ndarray:
    """Returns (N, N) bool: whether all tokens of a block of queries see all of a block of keys.

    bounds: as `token_bounds` returns them. The last block is never whole if the row ends within it.
    """
    tokens = len(bounds.ends)
    count = max(-(-tokens // BLOCK), 2)
    padded = (np.pad(each, (0, count * BLOCK - tokens)).reshape(count, BLOCK) for each in bounds)
    ends, positions, oldest, last = padded
    block_ends = (np.arange(count) + 1) * BLOCK
    seen_by_all = block_ends[:, None] <= ends.min(axis=1)
    sees_all = (last.min(axis=1)[:, None] >= block_ends - 1) & (oldest.max(axis=1)[:, None] <= positions.min(axis=1))
    return seen_by_all & sees_all


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how many entries of each row of (N, N) bool are set, and which: those come first; int32."""
    return blocks.sum(axis=1, dtype=np.int32), np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)


def visible_pairs(mask: RowMask) -> int:
    """Counts the pairs of a token of a row and one that it sees."""
    _, positions, oldest, last = (bound.astype(np.int64) for bound in token_bounds(mask))
    return int((positions - oldest + 1 + last - np.arange(len(last))).sum())
