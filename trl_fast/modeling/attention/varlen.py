"""Computes attention of token trees by torch's varlen flash kernels, on CUDA."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.data.segments import num_tokens
from trl_fast.ops.attention_merge import merge_attention
from trl_fast.ops.device import DeviceFacts, device_facts
from trl_fast.ops.eager_ops import eager_op

from .parts import attention_parts
from .row_attention import AttentionSpec, RowAttention, RowMask


class _Varlen(NamedTuple):
    """Holds what a varlen flash call is told of its sequences, and where in the row their queries and keys are.

    window: as in `Part`. query_of: (T,) int32, which of the queries a token of the row is, -1: none; None of the first
    call, whose queries are all tokens.
    """

    queries: slice | torch.Tensor
    keys: slice | torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    window: int | None
    query_of: torch.Tensor | None

    @property
    def options(self) -> dict[str, int | None]:
        """Returns the keywords that tell the kernels of a window; they align it at the last query and the last key."""
        if self.window is None:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


@functools.lru_cache(maxsize=64)
def _varlen_calls(mask: RowMask, device: torch.device, facts: DeviceFacts) -> tuple[_Varlen, ...]:
    """Returns a call for each group of parts: every segment to itself, runs, what continues the segments of a depth.

    facts: of the device; a simulation must not be given the tensors of another one.
    """
    calls = []
    for number, group in enumerate(filter(None, attention_parts(mask))):
        queries, keys = [part.queries for part in group], [one for part in group for one in part.keys]
        causal, backwards = group[0].causal, group[0].backwards
        num_queries, num_keys = [part.num_queries for part in group], [part.num_keys for part in group]
        cu_seqlens_q = _bounds(num_queries, device)
        cu_seqlens_k = cu_seqlens_q if num_queries == num_keys else _bounds(num_keys, device)
        calls.append(
            _Varlen(
                _together(queries, backwards, device),
                _together(keys, backwards, device),
                *(cu_seqlens_q, cu_seqlens_k, max(num_queries), max(num_keys), causal),
                mask.window if any(part.window for part in group) else None,
                _query_of(_places(queries, backwards), sum(map(num_tokens, mask.trees)), device) if number else None,
            )
        )
    return tuple(calls)


@functools.lru_cache(maxsize=64)
def told_in_cpp(mask: RowMask, device: torch.device) -> tuple[list[torch.Tensor | None], list[int]]:
    """Returns what the calls of a row are told as csrc/varlen_attention.cpp takes it.

    Of each call five tensors: indices of queries and keys, if they are no ranges, cu_seqlens of both, and query_of;
    and eight numbers: the ranges of queries and keys, the longest of each, causal and window, 0 if there is none.
    """
    tensors: list[torch.Tensor | None] = []
    numbers: list[int] = []
    for call in _varlen_calls(mask, device, device_facts(device)):
        ranges = [one if isinstance(one, slice) else slice(0, 0) for one in (call.queries, call.keys)]
        indices = [None if isinstance(one, slice) else one for one in (call.queries, call.keys)]
        tensors += [*indices, call.cu_seqlens_q, call.cu_seqlens_k, call.query_of]
        numbers += [border for one in ranges for border in (one.start, one.stop)]
        numbers += [call.longest_query, call.longest_key, int(call.causal), call.window or 0]
    return tensors, numbers


def _bounds(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Returns where each of N sequences begins and the last one ends, (N + 1,) int32."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return copy_to_device(bounds, device)


def _query_of(queries: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """Returns which of the queries (N,), given by their tokens, each token of a row is, (tokens,) int32, -1: none."""
    query_of = torch.full((tokens,), -1, dtype=torch.int32)
    query_of[queries] = torch.arange(len(queries), dtype=torch.int32)
    return copy_to_device(query_of, device)


def _places(ranges: list[slice], backwards: bool) -> torch.Tensor:
    """Returns the tokens (N,) int64 of ranges, each one from its last token to its first if backwards."""
    tokens = [torch.arange(one.start, one.stop) for one in ranges]
    return torch.cat([each.flip(0) for each in tokens] if backwards else tokens)


def _together(ranges: list[slice], backwards: bool, device: torch.device) -> slice | torch.Tensor:
    """Returns one slice, which copies nothing, if each range begins where the last ends; else indices (N,) int64."""
    if not backwards and all(one.stop == two.start for one, two in itertools.pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop)
    return copy_to_device(_places(ranges, backwards), device)


class CudaRowAttention(RowAttention):
    """Computes the parts of a row by torch's varlen flash kernels: one call, one of runs, one a depth of the trees."""

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

    @staticmethod
    def eager_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor | None:
        """Returns differentiable attention (1, heads, T, D) whose backward pass is in C++; None: there is none.

        query: (1, heads, T, D); key, value: (1, key-value heads, T, D).
        """
        run = eager_op("attention_merge", query, None, "varlen_attention")
        return None if run is None else run(query, key, value, *told_in_cpp(spec.mask, query.device), spec.scale)

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        # (T, heads, D), as the varlen kernels take it; groups of query heads are theirs to see to.
        self.query, self.key, self.value = (x[0].transpose(0, 1) for x in (query, key, value))
        self.calls = _varlen_calls(spec.mask, query.device, device_facts(query.device))
        self.scale = spec.scale

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
                *self._given(call), *lengths, 0.0, call.causal, False, scale=self.scale, **call.options
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
                **call.options,
            )
            if call.query_of is None:
                # The first call: its queries are the row, and so are its keys, unless some are there several times.
                sums = [x if isinstance(call.keys, slice) else self._gathered_back(x, call.keys) for x in found[1:]]
                sums = [found[0], *sums]
                continue
            for total, part, places in zip(sums, found, (rows, call.keys, call.keys), strict=True):
                if isinstance(places, slice):
                    total[places] += part
                else:  # one kernel where indexing would be three; no place is there twice
                    total.index_add_(0, places, part.to(total.dtype))
        grad_query, grad_key, grad_value = (total.transpose(0, 1)[None].to(grad.dtype) for total in sums)
        return grad_query, grad_key, grad_value

    def _gathered_back(self, grad: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Returns the sums (T, G, D) float32 of gradients (K, G, D) of tokens that were taken by an index (K,)."""
        total = grad.new_zeros(self.key.shape[0], *grad.shape[1:], dtype=torch.float32)
        return total.index_add_(0, index, grad.float())
