"""The kernels of the sparse gradient: the PyTorch reference, which is their specification, and the table of backends.

Most of a row's probabilities are tiny, but there are too many of them to drop: their sum is not. `row_samples` keeps
every p ≥ τ as it is, and of the smaller ones a systematic sample: walking along the row, an entry is kept whenever the
sum of the small probabilities passes the next multiple of τ, counted from a random start, and then stands for τ. An
entry is so kept with probability p/τ at weight τ: the expectation is exactly p, and a row has at most 1/τ + 1 entries,
whatever its distribution. Systematic sampling (Madow, Ann. Math. Statist. 20, 1949) needs one random number a row and
keeps each row's kept mass within τ of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..device import device_facts
from ..slices import spans
from .logit_transform import LogitTransform

# Temporaries of the references stay below this.
CHUNK_BYTES = 64 << 20


class SparseKernels(NamedTuple):
    """One implementation; the signatures are those of the references below."""

    samples: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    product: Callable[..., torch.Tensor]


def row_samples_reference(
    logits: torch.Tensor,
    vocab_size: int,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float,
    inv_temperature: float,
    lse: torch.Tensor,
    offsets: torch.Tensor,
    threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which probabilities of each row are kept.

    Args:
        logits: (T, R, W) raw logits, tile by tile; what lies beyond vocab_size is not read.
        bias: (V,) or None; scale, softcap, inv_temperature: see LogitTransform.
        lse: (R,) float32; offsets: (R,) float64 in [0, 1), the random starts; threshold: τ.

    Returns:
        counts (R,) int64 of each row's entries, and, row after row, their columns (E,) int64 and log-probabilities
        (E,) float32. An entry stands for the probability max(exp(log-probability), τ).
    """
    transform = LogitTransform(scale, softcap, inv_temperature)
    found = []
    for rows in spans(logits.shape[1], max(1, CHUNK_BYTES // (40 * vocab_size))):
        whole = logits[:, rows].transpose(0, 1).flatten(1)[:, :vocab_size]
        u, _ = transform.apply(whole, bias)
        logprobs = u - lse[rows, None]
        p = logprobs.exp().double()
        large = p >= threshold
        passed = torch.where(large, 0.0, p).cumsum(dim=1) / threshold + offsets[rows, None]
        small = passed.floor().diff(dim=1, prepend=torch.zeros_like(passed[:, :1])) > 0
        kept = large | small
        found.append((kept.sum(dim=1), kept.nonzero()[:, 1], logprobs[kept]))
    if not found:
        nothing = torch.empty(0, dtype=torch.int64, device=logits.device)
        return nothing, nothing.clone(), lse.new_empty(0)
    counts, columns, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return counts, columns, logprobs


def sparse_product_reference(
    starts: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows Σ_e values[e] · dense[indices[e]] over the entries e in [starts[m], starts[m + 1]) of row m.

    starts: (M + 1,) int64; indices: (E,) int64 in [0, K); values: (E,) float32; dense: (K, H) any float dtype.
    Returns (M, H) in `dtype`; sums run in float32 at least, in a fixed order.
    """
    num_rows, width = len(starts) - 1, dense.shape[1]
    out = torch.zeros(num_rows, width, dtype=dtype, device=dense.device)
    budget = max(1, CHUNK_BYTES // (8 * max(width, 1)))
    for rows in _row_groups(starts, budget):
        first, last = int(starts[rows.start]), int(starts[rows.stop])
        products = dense[indices[first:last]].to(values.dtype) * values[first:last, None]
        lengths = starts[rows.start + 1 : rows.stop + 1] - starts[rows.start : rows.stop]
        if last > first:
            out[rows] = torch.segment_reduce(products, "sum", lengths=lengths, unsafe=True, initial=0.0).to(dtype)
    return out


def _row_groups(starts: torch.Tensor, budget: int) -> Iterator[slice]:
    """Consecutive rows with at most `budget` entries together, or a single one with more."""
    row, num_rows = 0, len(starts) - 1
    while row < num_rows:
        end = int(torch.searchsorted(starts, starts[row] + budget, right=True)) - 1
        end = min(max(end, row + 1), num_rows)
        yield slice(row, end)
        row = end


def _cpp_samples(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.trl_fast.row_samples(*args)


def _cpp_product(
    starts: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    dense = dense if dense.stride(1) == 1 else dense.contiguous()
    return torch.ops.trl_fast.sparse_product(starts, indices, values, dense, dtype)


# On a GPU both are PyTorch: next to the head's one product they cost little.
SPARSE_KERNELS = {
    "torch": SparseKernels(row_samples_reference, sparse_product_reference),
    "cpp": SparseKernels(_cpp_samples, _cpp_product),
    "cuda": SparseKernels(row_samples_reference, sparse_product_reference),
    "triton": SparseKernels(row_samples_reference, sparse_product_reference),
}


def sparse_kernels(backend: str, device: torch.device) -> SparseKernels:
    """Returns a backend's kernels, or those that stand in for them on a simulated device."""
    return device_facts(device).sparse_kernels or SPARSE_KERNELS[backend]
