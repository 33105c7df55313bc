"""Scores rows by one kernel, product and row statistics together; of logits only 16-bit words reach memory, if kept.

The usual way is two steps: a library's product writes a tile of float32 logits, a row kernel reads it again. The fused
kernel does without that traffic, and a row's bits do not depend on how many other rows there are, which a library's
choice of kernels by shape cannot promise. There are two of it. Triton's serves where it was measured or is counted to
be faster (kernels/linear_scores.py). That of CUTLASS (cutlass_scores.py) serves where it is asked for: by count it is
the faster one, because its scoring runs while it multiplies, but it has not been run on a GPU yet. Both are tried out
on the GPU first.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..backends import supports
from ..device import device_facts
from ..matmul import SIXTEEN_BITS
from . import cutlass_scores
from .kept_logits import CHUNK, PACKED_DTYPE, KeptLogits, num_chunks, unpack
from .logit_transform import LogitTransform
from .plan import kept_shape
from .row_statistics import NUM_STATES, SUM, TARGET, TOP

if TYPE_CHECKING:
    from trl_fast.kernels.linear_scores import Tiles

    FusedTiles: TypeAlias = Tiles | cutlass_scores.CutlassTiles

logger = logging.getLogger(__name__)

# The fused kernel that serves is the first of these, unless the variable names another. QuACK's, read in its release
# 0.6.5, is none of them: it always writes the logits, and its log-sum-exp has the target in it. The state needs the
# sum of the others, without which -log p of a token that the model is sure of is lost.
FUSED_KERNELS = ("triton", "cutlass")
FUSED_VARIABLE = "TRL_FAST_FUSED_KERNEL"
# TMA reads and writes rows at multiples of 16 bytes.
_ALIGNMENT = 8
# Rows, hidden units and columns that the kernel is tried out on, and how far off its numbers may be.
_TRIED, _TOLERANCE = (200, 192, 1500), 2e-3


def fused_tiles(
    backend: str, hidden_size: int, dtype: torch.dtype, device: torch.device, *, capped: bool = False
) -> FusedTiles | None:
    """Returns the fused kernel's configuration for a head of such hidden states, None if it does not serve.

    dtype: in which products are computed; capped: whether logits have a softcap. It multiplies 16-bit numbers. In
    Triton's interpreter any GPU will do. Its tiles are NVIDIA's: AMD's GPUs, whose capabilities are numbers of another
    kind, take two steps.

    Raises:
        ValueError: TRL_FAST_FUSED_KERNEL names no fused kernel.
        RuntimeError: the one that it names cannot serve on this device; the message has the reason.
    """
    if (
        torch.version.hip is not None
        or backend not in ("cuda", "triton")
        or dtype not in SIXTEEN_BITS
        or hidden_size % _ALIGNMENT
    ):
        return None
    # Gradients of kept logits are Triton's, whichever kernel kept them.
    if not supports("linear_logprob", "triton", device, dtype).ok:
        return None
    asked = os.environ.get(FUSED_VARIABLE) or None
    kernel = asked or FUSED_KERNELS[0]
    tiles, reason = tiles_of(kernel, device)
    if asked and tiles is None:
        raise RuntimeError(f"{FUSED_VARIABLE}={asked} was set, but it cannot serve: {reason}")
    if tiles is None or capped and not tiles.capped:
        return None
    # A device that is not there cannot be tried out.
    if device.type != "cuda" or device_facts(device).serves is not None:
        return tiles
    return tiles if _works(tiles, dtype, device) else None


def tiles_of(kernel: str, device: torch.device) -> tuple[FusedTiles | None, str]:
    """Returns the configuration of a fused kernel for a device, None if it does not serve there, and the reason.

    Raises:
        ValueError: the kernel is unknown.
    """
    if kernel not in FUSED_KERNELS:
        raise ValueError(f"{FUSED_VARIABLE}: unknown name {kernel!r}; expected one of {FUSED_KERNELS}")
    if kernel == "cutlass":
        support = cutlass_scores.supports_cutlass(device)
        return (cutlass_scores.CutlassTiles() if support.ok else None), support.reason
    from trl_fast.kernels.linear_scores import INTERPRETED_TILES, TILES

    capability = device_facts(device).capability
    if capability == (0, 0):
        return INTERPRETED_TILES, "Triton's interpreter, for tests only"
    tiles = TILES.get(capability)
    return tiles, "product and statistics in one Triton kernel" if tiles else "there are no tiles for this GPU"


@functools.cache
def _works(tiles: FusedTiles, dtype: torch.dtype, device: torch.device) -> bool:
    """Tells whether the kernel does on this GPU, with this Triton, what it should; if not, it is said once."""
    try:
        # The first to ask may be a compiler, whose tensors have no data.
        with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            wrong = try_out(tiles, dtype, device)
    except Exception as error:
        wrong = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if wrong:
        logger.warning(f"The fused kernel of the head does not work on {device} ({wrong}); its scores take two steps.")
    return not wrong


def try_out(tiles: FusedTiles, dtype: torch.dtype, device: torch.device) -> str:
    """Tells what is wrong with the kernel's scores and kept logits of a small random head; nothing if all is right."""
    num_rows, hidden_size, vocab_size = _TRIED
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, device=device).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device)
    weight = (weight * hidden_size**-0.5).to(dtype)
    targets = torch.arange(num_rows, device=device) * 7
    logits = hidden.double() @ weight.double().t()
    others = logits.scatter(1, targets[:, None], float("-inf"))
    exact = others.logsumexp(1), logits.gather(1, targets[:, None])[:, 0]
    room = empty_packed(num_rows, vocab_size, device, tiles.columns)
    for keep in (None, room):
        state = torch.zeros(NUM_STATES, num_rows, dtype=torch.float64, device=device)
        given = (hidden, SlicedWeight.whole(weight), targets, None, LogitTransform(), 0, state, keep, tiles, 1 << 30)
        score_rows_fused(*given)
        found = state[TOP] + state[SUM].log(), state[TARGET]
        if not all(torch.allclose(a, b, rtol=0, atol=_TOLERANCE) for a, b in zip(found, exact, strict=True)):
            return "log-probs differ from PyTorch's"
    words, tops = room.tile(slice(0, vocab_size))
    assert tops is not None, "the room is for packed logits"
    if not torch.allclose(unpack(words, tops, tiles.columns).double(), others, rtol=0, atol=_TOLERANCE):
        return "kept logits differ from PyTorch's"
    return ""


def empty_packed(num_rows: int, vocab_size: int, device: torch.device, chunk: int = CHUNK) -> KeptLogits:
    """Returns room for packed logits in a single tile of all columns, as the plan of a GPU has it."""
    words = torch.empty(kept_shape(num_rows, vocab_size, vocab_size), dtype=PACKED_DTYPE, device=device)
    tops = torch.empty(1, num_rows, num_chunks(vocab_size, chunk), device=device)
    return KeptLogits(words, tops, vocab_size, chunk)


class SlicedWeight(NamedTuple):
    """Gives a head's weight (V, H) slice by slice.

    columns: slices of the vocabulary, together all of it; tile: returns the rows of one, (C, H), which serve until the
    next is asked for.
    """

    columns: list[slice]
    tile: Callable[[slice], torch.Tensor]

    @classmethod
    def whole(cls, weight: torch.Tensor) -> SlicedWeight:
        """Gives a weight (V, H) as it is."""
        return cls([slice(0, weight.shape[0])], weight.__getitem__)

    @property
    def vocab_size(self) -> int:
        """Returns the number of the weight's rows."""
        return self.columns[-1].stop


def score_rows_fused(
    hidden: torch.Tensor,
    weight: SlicedWeight,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    transform: LogitTransform,
    outputs: int,
    state: torch.Tensor,
    keep: KeptLogits | None,
    tiles: FusedTiles,
    part_bytes: int,
) -> None:
    """Writes the state (7, N) float64 of all rows after all columns; `keep` takes the logits of the first rows.

    hidden: (N, H), weight: of (V, H), both of the same dtype; targets: (N,) int64; bias: (V,) or None; transform: of
    the logits; keep: of packed logits, or of raw float32 ones; part_bytes: how much may stand between the kernel and
    the one that merges its tiles.
    """
    from trl_fast.kernels import linear_scores

    hidden, vocab_size = _aligned(hidden), weight.vocab_size
    num_rows, kept = hidden.shape[0], 0 if keep is None else keep.num_rows
    per_row = linear_scores.part_bytes(vocab_size, outputs, tiles)
    # Whole tiles of rows, so that none is computed twice.
    step = max(tiles.rows, part_bytes // per_row // tiles.rows * tiles.rows)
    for start in (*range(0, kept, step), *range(kept, num_rows, step)):
        rows = slice(start, min(start + step, kept if start < kept else num_rows))
        words, tops = (None, None) if keep is None or start >= kept else keep.tile(slice(0, vocab_size), rows)
        # The kernel writes to a state of its own rows; a slice of the state has the same stride.
        weights = (_aligned(weight.tile(columns)) for columns in weight.columns)
        given, to = (hidden[rows], weights, targets[rows], bias, transform), (outputs, state[:, rows], words, tops)
        if isinstance(tiles, cutlass_scores.CutlassTiles):
            cutlass_scores.linear_scores(*given, *to, tiles, vocab_size=vocab_size)
        else:
            linear_scores.linear_scores(*given, *to, tiles, vocab_size=vocab_size)
    state[TARGET].masked_fill_((targets < 0) | (targets >= vocab_size), float("nan"))


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the matrix, copied if its rows do not begin at multiples of 16 bytes or its numbers are not adjacent."""
    # Fake tensors have no address; memory of their own begins at a multiple.
    is_fake = isinstance(matrix, FakeTensor)
    start = matrix.storage_offset() * matrix.element_size() if is_fake else matrix.data_ptr()
    aligned = matrix.stride(1) == 1 and matrix.stride(0) % _ALIGNMENT == 0 and start % 16 == 0
    return matrix if aligned else matrix.clone(memory_format=torch.contiguous_format)
