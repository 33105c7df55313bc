"""Computes attention of token trees by torch's varlen flash kernels, on CUDA."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.segments import TreeLengths, num_tokens
from trl_fast.ops.attention_merge import merge_attention
from trl_fast.ops.device import DeviceFacts, device_facts

from .parts import attention_parts
from .row_attention import AttentionSpec, RowAttention


class _Varlen(NamedTuple):
    """Holds what a varlen flash call is told of its sequences, and where in the row their queries and keys are.

    query_of: (T,) int32, which of the queries a token of the row is, -1: none; None of a causal call, whose queries
    are all tokens.
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    query_of: torch.Tensor | None


@functools.lru_cache(maxsize=64)
def _varlen_calls(trees: tuple[TreeLengths, ...], device: torch.device, facts: DeviceFacts) -> tuple[_Varlen, ...]:
    """Returns a call for each group of parts: every segment to itself, and what continues the segments of a depth.

    facts: of the device; a simulation must not be given the tensors of another one.
    """
    calls = []
    for group in filter(None, attention_parts(trees)):
        queries, keys, causal = [part.queries for part in group], [part.keys for part in group], group[0].causal
        cu_seqlens_q = _bounds(queries, device)
        # Each segment's queries are its keys.
        cu_seqlens_k = cu_seqlens_q if causal else _bounds(keys, device)
        calls.append(
            _Varlen(
                *(_together(queries, device), _together(keys, device), cu_seqlens_q, cu_seqlens_k),
                *(max(map(_length, queries)), max(map(_length, keys)), causal),
                None if causal else _query_of(queries, sum(map(num_tokens, trees)), device),
            )
        )
    return tuple(calls)


def _length(tokens: slice) -> int:
    return tokens.stop - tokens.start


def _bounds(ranges: list[slice], device: torch.device) -> torch.Tensor:
    """Returns where each of N sequences begins and the last one ends, (N + 1,) int32."""
    bounds = torch.tensor([0, *itertools.accumulate(map(_length, ranges))], dtype=torch.int32)
    return copy_to_device(bounds, device)


def _query_of(queries: list[slice], tokens: int, device: torch.device) -> torch.Tensor:
    """Returns which of the queries each token of a row is, (tokens,) int32, -1: none."""
    query_of = torch.full((tokens,), -1, dtype=torch.int32)
    rows = torch.cat([torch.arange(part.start, part.stop) for part in queries])
    query_of[rows] = torch.arange(len(rows), dtype=torch.int32)
    return copy_to_device(query_of, device)


def _together(ranges: list[slice], device: torch.device) -> slice | torch.Tensor:
    """Returns one slice, which copies nothing, if each range begins where the last ends; else indices (N,) int64."""
    if all(one.stop == two.start for one, two in itertools.pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return copy_to_device(torch.cat([torch.arange(r.start, r.stop) for r in ranges]), device)


class CudaRowAttention(RowAttention):
    """Computes the parts of a row by torch's varlen flash kernels: one call, and one a depth of the trees."""

    device_kind: ClassVar[str | None] = "cuda"

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns whether the kernels serve queries (1, heads, T, D) and values (1, ..., Dv), and why not."""
        width = query.shape[-1]
        if spec.softcap:
            return False, "flash kernels cap no scores"
        if width != value.shape[-1]:
            return False, f"keys of {width} and values of {value.shape[-1]} channels differ"
        if query.dtype not in (torch.bfloat16, torch.float16):
            return False, f"CUDA's flash kernels take bfloat16 and float16, not {query.dtype}"
        if width > 256 or width % 8:
            return False, f"CUDA's flash kernels take heads of 8 to 256 channels in steps of 8, not {width}"
        return device_facts(query.device).capability >= (8, 0), "the GPU is older than flash kernels"

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        # (T, heads, D), as the varlen kernels take it; groups of query heads are theirs to see to.
        self.query, self.key, self.value = (x[0].transpose(0, 1) for x in (query, key, value))
        self.calls, self.scale = _varlen_calls(spec.trees, query.device, device_facts(query.device)), spec.scale

    def _given(self, call: _Varlen) -> Iterator[torch.Tensor]:
        yield self.query[call.queries].contiguous()
        yield self.key[call.keys].contiguous()
        yield self.value[call.keys].contiguous()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, D) and lse (heads, T) float32."""
        out: Any = None
        lse: Any = None
        states: list[torch.Tensor] = []
        for call in self.calls:
            lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.longest_query, call.longest_key)
            found, found_lse, *rng_state, _ = torch.ops.aten._flash_attention_forward(
                *self._given(call), *lengths, 0.0, call.causal, False, scale=self.scale
            )
            states += rng_state
            if call.query_of is None:
                out, lse = found, found_lse
            else:
                out, lse = merge_attention(out, lse, found, found_lse, call.query_of)
        # Two tensors a call.
        self.rng_state = states
        return out.transpose(0, 1)[None], lse

    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of query, key and value, in their shapes."""
        grad, out = (x[0].transpose(0, 1) for x in (grad, out))
        for number, call in enumerate(self.calls):
            rows = call.queries
            lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.longest_query, call.longest_key)
            found = torch.ops.aten._flash_attention_backward(
                grad[rows].contiguous(),
                *self._given(call),
                out[rows].contiguous(),
                lse[:, rows].contiguous(),
                *lengths,
                0.0,
                call.causal,
                *self.rng_state[2 * number : 2 * number + 2],
                scale=self.scale,
            )
            if call.causal:
                # The first call: it covers the row.
                sums = found
                continue
            for total, part, places in zip(sums, found, (rows, call.keys, call.keys), strict=True):
                if isinstance(places, slice):
                    total[places] += part
                else:  # one kernel where indexing would be three; no place is there twice
                    total.index_add_(0, places, part)
        return tuple(total.transpose(0, 1)[None] for total in sums)
