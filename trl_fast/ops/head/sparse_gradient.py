"""Computes a sparse, unbiased gradient of the head from a sample of its probabilities.

The kernels' PyTorch reference is their specification; `SPARSE_KERNELS` is the table of backends.

Most of a row's probabilities are tiny, but there are too many of them to drop: their sum is not. `row_samples` keeps
every p ≥ τ as it is, and of the smaller ones a systematic sample: walking along the row, an entry is kept whenever the
sum of the small probabilities passes the next multiple of τ, counted from a random start, and then stands for τ. An
entry is so kept with probability p/τ at weight τ: the expectation is exactly p, and a row has at most 1/τ + 1 entries,
whatever its distribution. Systematic sampling (Madow, Ann. Math. Statist. 20, 1949) needs one random number a row and
keeps each row's kept mass within τ of the whole.

The gradient of a logit is p · (a + b · logp), and known for the target, which needs no sample (see row_kernels.py).
With each kept entry in the place of p its expectation over the sample is exact, and backward is two products of a
sparse matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..device import device_facts
from .logit_transform import LogitTransform
from .row_statistics import LOGPROB_ROW, LSE_ROW

# Temporaries of the references stay below this.
CHUNK_BYTES = 64 << 20


class SparseKernels(NamedTuple):
    """Holds one implementation of both kernels; the signatures are those of the references below."""

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
    """Samples the probabilities of each row.

    Args:
        logits: (T, R, W) raw logits, tile by tile; what lies beyond vocab_size is not read.
        bias: (V,) or None; scale, softcap, inv_temperature: see LogitTransform.
        lse: (R,) float32; offsets: (R,) float64 in [0, 1), the random offsets; threshold: τ.

    Returns:
        counts (R,) int64 of each row's entries, and, row after row, their columns (E,) int64 and log-probabilities
        (E,) float32. An entry stands for the probability max(exp(log-probability), τ).
    """
    transform = LogitTransform(scale, softcap, inv_temperature)
    found = []
    step = max(1, CHUNK_BYTES // (40 * vocab_size))
    for start in range(0, logits.shape[1], step):
        rows = slice(start, start + step)
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
    row_offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Computes the rows Σ_e values[e] · dense[indices[e]] over the entries e of each row m.

    row_offsets: (M + 1,) int64, row m has the entries [row_offsets[m], row_offsets[m + 1]); indices: (E,) int64
    in [0, K); values: (E,) float32; dense: (K, H) any float dtype.
    Returns (M, H) in `dtype`; sums run in float32 at least, in a fixed order.
    """
    num_rows, width = len(row_offsets) - 1, dense.shape[1]
    out = torch.zeros(num_rows, width, dtype=dtype, device=dense.device)
    budget = max(1, CHUNK_BYTES // (8 * max(width, 1)))
    for rows in _row_groups(row_offsets, budget):
        first, last = int(row_offsets[rows.start]), int(row_offsets[rows.stop])
        products = dense[indices[first:last]].to(values.dtype) * values[first:last, None]
        lengths = row_offsets[rows.start + 1 : rows.stop + 1] - row_offsets[rows.start : rows.stop]
        if last > first:
            out[rows] = torch.segment_reduce(products, "sum", lengths=lengths, unsafe=True, initial=0.0).to(dtype)
    return out


def _row_groups(row_offsets: torch.Tensor, budget: int) -> Iterator[slice]:
    """Yields consecutive rows with at most `budget` entries together, or a single one with more."""
    row, num_rows = 0, len(row_offsets) - 1
    while row < num_rows:
        end = int(torch.searchsorted(row_offsets, row_offsets[row] + budget, right=True)) - 1
        end = min(max(end, row + 1), num_rows)
        yield slice(row, end)
        row = end


def _cpp_samples(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.trl_fast.row_samples(*args)


def _cpp_product(
    row_offsets: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    # An empty tensor counts as contiguous whatever its strides.
    dense = dense if dense.stride(1) == 1 else dense.clone(memory_format=torch.contiguous_format)
    return torch.ops.trl_fast.sparse_product(row_offsets, indices, values, dense, dtype)


# There is none for a GPU, where HeadOptions refuses the sparse gradient for good. An entry gathers a row of the weight
# and one of the hidden states: 4·H bytes at the rate of memory, for a dense entry's 4·H operations at the rate of
# tensor cores, which do some 230 of them in the time of a byte. It would win with fewer than V / 230 entries a row,
# 650 of 151936; at the default threshold there are 724.
SPARSE_KERNELS = {
    "torch": SparseKernels(row_samples_reference, sparse_product_reference),
    "cpp": SparseKernels(_cpp_samples, _cpp_product),
}


def sparse_kernels_of(backend: str, device: torch.device) -> SparseKernels:
    """Returns the kernels of a backend, or those that stand in for them on a simulated device.

    Raises:
        RuntimeError: the backend has none.
    """
    found = device_facts(device).sparse_kernels or SPARSE_KERNELS.get(backend)
    if found is None:
        raise RuntimeError(f"backend={backend!r}: head_grad='sparse' has kernels for {list(SPARSE_KERNELS)} only")
    return found


def sparse_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: torch.Tensor,
    coefficients: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor,
    logprobs: torch.Tensor,
    transform: LogitTransform,
    threshold: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    product: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Computes the gradients of hidden (N, H), weight (V, H) and bias (V,) from a sample; None where not needed.

    targets: (N,) int64; statistics: (7, N); coefficients: (4, N), see row_kernels.py; counts (N,), columns (E,) int64,
    logprobs (E,): the sample as row_samples gives it, for this threshold; product: the kernel of the sparse product.
    """
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    numbers = torch.arange(num_rows, device=hidden.device)
    rows = numbers.repeat_interleave(counts)
    lse, target_logprobs = statistics[LSE_ROW], statistics[LOGPROB_ROW]
    a, b, d, _ = coefficients
    values = logprobs.exp().clamp(min=threshold) * (a[rows] + b[rows] * logprobs)
    values = values * transform.derivative(logprobs + lse[rows])
    values.masked_fill_(columns == targets[rows], 0.0)
    values = torch.cat((values, d * transform.derivative(target_logprobs + lse)))
    # A target outside the vocabulary has made its row NaN already.
    rows, columns = torch.cat((rows, numbers)), torch.cat((columns, targets.clamp(0, vocab_size - 1)))
    order = _targets_behind_entries(rows, counts)
    order = order[values[order] != 0]
    rows, columns, values = rows[order], columns[order], values[order]
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        grad_hidden = product(_offsets(rows, num_rows), columns, values, weight, hidden.dtype)
    if need_weight or need_bias:
        # 32 bits are sorted in two thirds of the time of 64.
        row_offsets, order = _offsets(columns, vocab_size), torch.argsort(columns.int(), stable=True)
    if need_weight:
        grad_weight = product(row_offsets, rows[order], values[order], hidden, weight.dtype)
    if need_bias:
        assert bias is not None, "autograd asks for the gradient of a tensor"
        ones = values.new_ones(1, 1)
        zeros = torch.zeros_like(order)
        grad_bias = product(row_offsets, zeros, values[order], ones, values.dtype).squeeze(1).to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def _targets_behind_entries(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns the order (E + N,) in which each row's target follows its entries.

    rows: (E + N,) of all entries, row after row, and then of all targets; counts: (N,) of the entries.
    """
    num_entries = len(rows) - len(counts)
    numbers = torch.arange(len(rows), device=rows.device)
    order = torch.empty_like(rows)
    order[numbers[:num_entries] + rows[:num_entries]] = numbers[:num_entries]
    order[counts.cumsum(dim=0) + rows[num_entries:]] = numbers[num_entries:]
    return order


def _offsets(keys: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Returns where each group begins, (G + 1,), once the entries are sorted by their groups, keys (E,)."""
    offsets = keys.new_zeros(num_groups + 1)
    torch.cumsum(torch.bincount(keys, minlength=num_groups), dim=0, out=offsets[1:])
    return offsets
