"""Attention of rows of trees by its definition, and torch's varlen flash kernels on the CPU."""

from __future__ import annotations

import functools
import itertools

import torch

from trl_fast.data.segments import num_tokens, segments_of
from trl_fast.modeling.attention import tree_attention as op
from trl_fast.modeling.attention.varlen import CudaRowAttention

TREES = {
    "a pair": ((40, 17, 9),),
    "several trees": ((5, 3, 4), (1, 1, 1), (30, 2)),
    "one branch": ((12, 20),),
    "a hundred branches": ((9, *([2] * 100)),),
    "no branches": ((8,), (3,), (21,)),
    "no prompt": ((0, 5, 7),),
    "empty branches": ((6, 0, 4, 0), (3, 0)),
    "one token each": ((1, 1),),
    "nested": ((12, (5, 3, 4), 7), (9, (2, 6, (4, 1, 2)))),
    "nested, something empty": ((0, (6, 0, (3, 2, 0)), 4), (5, (0, 3, 2), (0,)), (3, ((1), 2))),
    "a chain": ((3, (2, (4, (1, (5, 2))))),),
}


@functools.cache
def dense_mask(trees, window=None, runs=(), whole_runs=False) -> torch.Tensor:
    """(T, T) bool, from the definition: token by token; a tree is read anew here."""
    tokens: list[tuple] = []  # a token is its sequence up to itself

    def read(tree, before):
        length, *children = (tree,) if isinstance(tree, int) else tree
        for _ in range(length):
            before = (*before, len(tokens))
            tokens.append(before)
        for child in children:
            read(child, before)

    for tree in trees:
        read(tree, ())
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for token, sequence in enumerate(tokens):
        mask[token, list(sequence if window is None else sequence[-window:])] = True
    for start, end in runs:
        for token in range(start, end):
            mask[token, start if whole_runs else token : end] = True
    return mask


def random_tree(choice, depth=0):
    """Lengths of a tree of up to four levels, some segments empty."""
    length = choice.choice([0, 1, 2, choice.randrange(60)])
    if depth == 3 or choice.random() < 0.4:
        return length if depth else (length,)
    return (length, *(random_tree(choice, depth + 1) for _ in range(choice.randrange(1, 4))))


def random_runs(choice, trees):
    """Runs in some segments of a row, several in some: side by side, with gaps between, or the whole segment."""
    runs = []
    for segment in segments_of(trees):
        cuts = sorted(choice.randrange(segment.start, segment.end + 1) for _ in range(choice.choice([0, 2, 3, 4])))
        cuts = choice.choice([cuts, [segment.start, segment.end]])
        runs += [(a, b) for a, b in itertools.pairwise(cuts) if a < b and choice.random() < 0.7]
    return tuple(runs)


def problem(trees, heads=4, groups=2, dtype=torch.float32, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(num_tokens, trees))
    make = lambda h: torch.randn(1, h, tokens, width, generator=generator).to(dtype)  # noqa: E731
    return make(heads).requires_grad_(), make(groups).requires_grad_(), make(groups).requires_grad_(), make(heads)


def dense(query, key, value, trees, dtype, *, scale=None, softcap=None, sinks=None, **mask):
    """As a model's own eager attention computes it, in `dtype`, the softmax in float32 at least; and the leaves."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value, sinks) if x is not None]
    repeats = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in leaves[1:3])
    scores = leaves[0] @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~dense_mask(trees, **mask), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, leaves[3][None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    shares = scores.to(torch.promote_types(dtype, torch.float32)).softmax(-1)[..., : k.shape[2]]
    return shares.to(dtype) @ v, leaves


class VarlenOnTheCpu:
    """The varlen flash kernels by their contract, sequence by sequence, so that what they are told can be checked.

    A causal call hides the keys behind a query, a window those further than `window_size_left` before it; the last
    query stands at the last key.
    """

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", self.forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", self.backward)
        monkeypatch.setattr(op, "KERNELS", (CudaOnTheCpu,))

    def _sequences(
        self, q, k, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, window_size_left=None, window_size_right=None
    ):
        self.calls.append((max_q, max_k, causal, window_size_left))
        assert window_size_left is None or (causal and window_size_right == 0)
        borders = [s.tolist() for s in (cu_seqlens_q, cu_seqlens_k)]
        assert borders[0][-1] == len(q) and borders[1][-1] == len(k)
        queries, keys = ([slice(a, b) for a, b in itertools.pairwise(s)] for s in borders)
        for rows, columns in zip(queries, keys, strict=True):
            n, m = rows.stop - rows.start, columns.stop - columns.start
            assert 0 < n <= max_q and 0 < m <= max_k
            behind = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
            left = m if window_size_left is None else window_size_left
            yield rows, columns, ((behind > 0) & causal) | (behind < -left)

    def _scores(self, q, k, hidden, scale):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return torch.einsum("nhd,mhd->hnm", q, k).mul(scale).masked_fill(hidden, float("-inf"))

    def forward(self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window):
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        for rows, columns, hidden in self._sequences(q, k, cu_q, cu_k, max_q, max_k, causal, **window):
            scores = self._scores(q[rows], k[columns], hidden, scale)
            lse[:, rows] = scores.logsumexp(-1)
            values = v[columns].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        self, g, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale, **window
    ):
        assert rng.shape == (2,) and unused.shape == (0,)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        delta = (g * out).sum(-1).t()
        for rows, columns, hidden in self._sequences(q, k, cu_q, cu_k, max_q, max_k, causal, **window):
            shares = (self._scores(q[rows], k[columns], hidden, scale) - lse[:, rows, None]).exp()
            keys, values = (x[columns].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            upstream = torch.einsum("nhd,mhd->hnm", g[rows], values)
            scores = shares * (upstream - delta[:, rows, None]) * scale
            grads[0][rows] = torch.einsum("hnm,mhd->nhd", scores, keys)
            found = torch.einsum("hnm,nhd->mhd", scores, q[rows]), torch.einsum("hnm,nhd->mhd", shares, g[rows])
            for total, part in zip(grads[1:], found, strict=True):
                total[columns] = part.unflatten(1, (k.shape[1], -1)).sum(2)
        return tuple(grads)


class CudaOnTheCpu(CudaRowAttention):
    """CUDA's path for tensors on the CPU, in float32."""

    device_kind = None

    @staticmethod
    def supports(*_):
        return True, ""
