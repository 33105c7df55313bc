"""Inputs of the op for attention of a row, and its results."""

from __future__ import annotations

import torch

from trl_fast.data.segments import segments_of
from trl_fast.ops.attention import TokenTable, row_attention, row_attention_backward


def table_of(trees, *, window=None, runs=(), whole_runs=False):
    segments = [n for s in segments_of(trees) for n in (s.start, s.end, s.tree_end, s.offset)]
    return TokenTable(segments, [n for run in runs for n in run], whole_runs, window or 0)


def draw(heads, key_heads, width, value_width, tokens, dtype=torch.float32, size=1.0):
    """Query, key, value and the gradient of the output, numbers that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, width), (key_heads, width), (key_heads, value_width), (heads, value_width)
    make = [torch.randn(h, tokens, d, generator=generator).to(dtype) for h, d in shapes]
    return make[0] * size, *make[1:]


def ours(given, trees, mask, scale, softcap, backend):
    """Output, log-sum-exp, and the gradients of query, key and value."""
    query, key, value, grad = given
    table = table_of(trees, **mask)
    out, lse = row_attention(query, key, value, table, scale, softcap, backend=backend)
    found = row_attention_backward(grad, query, key, value, out, lse, table, scale, softcap, backend=backend)
    return out, lse, *found
