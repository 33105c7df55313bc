"""Computes exact attention over a row of token trees, a prompt once, whatever the number of its branches.

Every segment (a prompt or a branch) attends to itself, causally; the branches of a tree, as one block of queries,
attend to its whole prompt. The two partial results of a branch are merged by their log-sum-exps, as the blocks of
FlashAttention are (arXiv 2205.14135, section 3.1). A flash backward needs of the forward pass only the output and the
log-sum-exp of the whole softmax, so the same kernels give exact gradients part by part, from the merged ones.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from trl_fast.data.device_transfer import copy_to_device
from trl_fast.ops.attention_merge import merge_attention, merge_into
from trl_fast.ops.device import DeviceFacts, device_facts
from trl_fast.ops.matmul import gemm_dtype
from trl_fast.ops.named_gradients import first_derivative

logger = logging.getLogger(__name__)

# Most bytes of scores that stand at once where there is no flash kernel.
_TILE_BYTES = 1 << 27

# Lengths of a tree's segments in the order of the row: its prompt, then its branches.
TreeLengths = tuple[int, ...]


class Part(NamedTuple):
    """Holds queries that attend to keys of a row: to all of them, or causally to their own."""

    queries: slice
    keys: slice
    causal: bool


@functools.lru_cache(maxsize=64)
def attention_parts(trees: tuple[TreeLengths, ...]) -> tuple[Part, ...]:
    """Returns the parts of a row's attention; the causal ones of its segments come first and cover the row."""
    own, across, start = [], [], 0
    for prompt, *branches in trees:
        branches_start = start + prompt
        end = branches_start
        if prompt:
            own.append(Part(slice(start, branches_start), slice(start, branches_start), True))
        for length in branches:
            if length:
                own.append(Part(slice(end, end + length), slice(end, end + length), True))
            end += length
        if prompt and end > branches_start:
            across.append(Part(slice(branches_start, end), slice(start, branches_start), False))
        start = end
    return (*own, *across)


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: tuple[TreeLengths, ...],
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes attention of every token to its own segment up to itself, and of a branch's tokens to their prompt.

    Args:
        query: (1, heads, T, D); key: (1, key-value heads, T, D); value: (1, key-value heads, T, Dv); of one float
            dtype. Key-value heads are not repeated.
        trees: lengths of the row's segments, summing to T.
        scale: of the scores; 1/√D if None.
        softcap: scores become softcap · tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2).

    Returns:
        (1, heads, T, Dv), differentiable.

    Raises:
        ValueError: the lengths do not sum to T, or the heads of the queries are no multiple of those of the keys.
    """
    tokens, heads, groups = query.shape[2], query.shape[1], key.shape[1]
    if sum(map(sum, trees)) != tokens:
        raise ValueError(f"trees: lengths sum to {sum(map(sum, trees))}, the row has {tokens} tokens")
    if heads % groups:
        raise ValueError(f"query: {heads} heads are no multiple of the {groups} key-value heads")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernels = _choose_kernels(query, value, softcap)
    return _TreeAttention.apply(query, key, value, trees, scale, kernels)


def _choose_kernels(
    query: torch.Tensor, value: torch.Tensor, softcap: float | None
) -> Callable[..., CpuRowAttention | CudaRowAttention]:
    """Returns the class that computes a row: flash kernels if they serve, else plain PyTorch, logged on a GPU."""
    serves, reason = flash_serves(query, value, softcap)
    if serves:
        return CudaRowAttention if device_facts(query.device).is_cuda else CpuRowAttention
    if query.is_cuda and query.requires_grad:
        _say_it_is_plain(reason)
    return functools.partial(PlainRowAttention, softcap=softcap)


@functools.cache
def _say_it_is_plain(reason: str) -> None:
    """Logs a reason once; only in training, since what a model is tried out with may not have its autocast yet."""
    logger.warning(f"Attention runs in plain PyTorch, which is slower on long rows: {reason}.")


def flash_serves(query: torch.Tensor, value: torch.Tensor, softcap: float | None = None) -> tuple[bool, str]:
    """Returns whether torch's flash kernels serve queries (..., D) and values (..., Dv), and why not."""
    width = query.shape[-1]
    if softcap:
        return False, "flash kernels cap no scores"
    if width != value.shape[-1]:
        return False, f"keys of {width} and values of {value.shape[-1]} channels differ"
    facts = device_facts(query.device)
    if facts.kind == "cpu":
        return True, "torch's flash kernel for the CPU"
    if not facts.is_cuda:
        return False, f"there is no flash kernel for {facts.kind}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return False, f"CUDA's flash kernels take bfloat16 and float16, not {query.dtype}"
    if width > 256 or width % 8:
        return False, f"CUDA's flash kernels take heads of 8 to 256 channels in steps of 8, not {width}"
    return facts.capability >= (8, 0), "the GPU is older than flash kernels"


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: tuple[TreeLengths, ...],
        scale: float,
        kernels: Callable[..., CpuRowAttention | CudaRowAttention],
    ) -> torch.Tensor:
        row = kernels(query, key, value, trees, scale)
        out, lse = row.forward()
        # All tensors, so that checkpointing lets go of them.
        ctx.save_for_backward(query, key, value, out, lse, *row.rng_state)
        ctx.trees, ctx.scale, ctx.kernels = trees, scale, kernels
        return out

    @staticmethod
    @first_derivative("attention of token trees")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse, *rng_state = ctx.saved_tensors
        row = ctx.kernels(query, key, value, ctx.trees, ctx.scale)
        row.rng_state = rng_state
        return (*row.backward(grad, out, lse), None, None, None)


class CpuRowAttention:
    """Computes the parts of a row by torch's flash kernel for the CPU, one call each.

    Key-value heads stand as the batch, so that their groups of query heads read them without a copy. Where 16-bit
    products are slow the kernel gets float32 numbers.
    """

    rng_state: Sequence[torch.Tensor] = ()

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: tuple[TreeLengths, ...],
        scale: float,
    ) -> None:
        groups = key.shape[1]
        self.dtype = query.dtype
        query, key, value = (x.to(gemm_dtype(x)) for x in (query, key, value))
        self.query = self._grouped(query, groups)
        self.key, self.value = (x[0][:, None].expand(-1, self.query.shape[1], -1, -1) for x in (key, value))
        self.parts, self.scale = attention_parts(trees), scale

    @staticmethod
    def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
        """Returns (1, heads, T, D) as (key-value heads, heads of a group, T, D)."""
        return x[0].unflatten(0, (groups, -1))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output (G, R, t, Dv) and log-sum-exp (G, R, t) of queries (G, R, t, D), keys (G, R, K, D)."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=self.scale
        )

    def attend_backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of one part's query (G, R, t, D) and, summed over a group, of key and value (G, K, D)."""
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, scale=self.scale
        )
        return found[0], found[1].sum(dim=1), found[2].sum(dim=1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, Dv) and lse (key-value heads, heads of a group, T) float32."""
        rows_of = self.query.shape[:3]
        out = self.query.new_empty(*rows_of, self.value.shape[-1])
        lse = self.query.new_empty(rows_of, dtype=torch.promote_types(self.query.dtype, torch.float32))
        for rows, keys, causal in self.parts:
            found, found_lse = self.attend(
                self.query[:, :, rows], self.key[:, :, keys], self.value[:, :, keys], causal
            )
            if causal:
                out[:, :, rows], lse[:, :, rows] = found, found_lse
            else:
                merge_into(out[:, :, rows], lse[:, :, rows], found, found_lse)
        return out.flatten(0, 1)[None].to(self.dtype), lse

    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of query, key and value, in their shapes."""
        grad, out = (self._grouped(x.to(self.query.dtype), self.query.shape[0]) for x in (grad, out))
        grad_query = torch.zeros_like(self.query)
        grad_key, grad_value = (x.new_zeros(x.shape[0], *x.shape[2:]) for x in (self.key, self.value))
        for rows, keys, causal in self.parts:
            found = self.attend_backward(
                grad[:, :, rows],
                self.query[:, :, rows],
                self.key[:, :, keys],
                self.value[:, :, keys],
                out[:, :, rows],
                lse[:, :, rows],
                causal,
            )
            grad_query[:, :, rows] += found[0]
            grad_key[:, keys] += found[1]
            grad_value[:, keys] += found[2]
        grad_query = grad_query.flatten(0, 1)[None]
        return grad_query.to(self.dtype), grad_key[None].to(self.dtype), grad_value[None].to(self.dtype)


class PlainRowAttention(CpuRowAttention):
    """Computes the parts of a row by plain PyTorch on any device, a tile of queries at a time.

    Scores of `_TILE_BYTES` exist at once, in forward and in backward.
    """

    def __init__(self, *args: Any, softcap: float | None = None) -> None:
        super().__init__(*args)
        self.softcap = softcap

    def _tiles(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
        """Yields tiles of queries, each with the keys that its last one sees."""
        heads, tokens = query.shape[0] * query.shape[1], query.shape[2]
        step = max(_TILE_BYTES // (4 * heads * key.shape[2]), 1)
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            yield slice(start, end), slice(0, end if causal else key.shape[2])

    @staticmethod
    def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns (G, R, t, D) times (G, R, K, D) transposed, one for all R heads of a group: (G, R, t, K)."""
        return (rows.flatten(1, 2) @ keys[:, 0].transpose(-1, -2)).unflatten(1, rows.shape[1:3])

    def _scores(self, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scores = self._products(query, key).to(dtype) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    @staticmethod
    def _unseen(rows: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """Returns (rows, keys) bool: keys after the row's own, in a causal part."""
        return torch.arange(keys.stop, device=device) > torch.arange(rows.start, rows.stop, device=device)[:, None]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output (G, R, t, Dv) and log-sum-exp (G, R, t) of queries (G, R, t, D), keys (G, R, K, D)."""
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, keys in self._tiles(query, key, causal):
            scores = self._scores(query[:, :, rows], key[:, :, keys], lse.dtype)
            if causal:
                scores.masked_fill_(self._unseen(rows, keys, query.device), float("-inf"))
            lse[:, :, rows] = scores.logsumexp(-1)
            weights = scores.sub_(lse[:, :, rows, None]).exp_()
            out[:, :, rows] = self._products(weights.to(value.dtype), value[:, :, keys].transpose(-1, -2))
        return out, lse

    def attend_backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of one part's query (G, R, t, D) and, summed over a group, of key and value (G, K, D)."""
        grad_query, dtype = torch.empty_like(query), query.dtype
        grad_key, grad_value = (lse.new_zeros(x.shape[0], *x.shape[2:]) for x in (key, value))
        delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
        for rows, keys in self._tiles(query, key, causal):
            scores = self._scores(query[:, :, rows], key[:, :, keys], lse.dtype)
            weights = (scores - lse[:, :, rows, None]).exp_()
            if causal:
                weights.masked_fill_(self._unseen(rows, keys, query.device), 0.0)
            upstream = grad[:, :, rows]
            grad_value[:, keys] += weights.to(dtype).flatten(1, 2).transpose(-1, -2) @ upstream.flatten(1, 2)
            weights *= self._products(upstream, value[:, :, keys]).to(lse.dtype) - delta[:, :, rows]
            if self.softcap is not None:
                weights *= 1 - (scores / self.softcap).square_()
            weights = (weights * self.scale).to(dtype)
            grad_query[:, :, rows] = self._products(weights, key[:, :, keys].transpose(-1, -2))
            grad_key[:, keys] += weights.flatten(1, 2).transpose(-1, -2) @ query[:, :, rows].flatten(1, 2)
        return grad_query, grad_key, grad_value


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
    """Returns two calls, whatever the number of segments: every segment to itself, and branches to their prompts.

    facts: of the device; a simulation must not be given the tensors of another one.
    """
    parts = attention_parts(trees)
    calls = []
    for causal in (True, False):
        chosen = [part for part in parts if part.causal == causal]
        if not chosen:
            continue
        queries, keys = ([getattr(part, side) for part in chosen] for side in ("queries", "keys"))
        cu_seqlens_q = _bounds(queries, device)
        # Each segment's queries are its keys.
        cu_seqlens_k = cu_seqlens_q if causal else _bounds(keys, device)
        calls.append(
            _Varlen(
                *(_together(queries, device), _together(keys, device), cu_seqlens_q, cu_seqlens_k),
                *(max(map(_length, queries)), max(map(_length, keys)), causal),
                None if causal else _query_of(queries, sum(map(sum, trees)), device),
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


class CudaRowAttention:
    """Computes the parts of a row by torch's varlen flash kernels, two calls a layer."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: tuple[TreeLengths, ...],
        scale: float,
    ) -> None:
        # (T, heads, D), as the varlen kernels take it; groups of query heads are theirs to see to.
        self.query, self.key, self.value = (x[0].transpose(0, 1) for x in (query, key, value))
        self.calls, self.scale = _varlen_calls(trees, query.device, device_facts(query.device)), scale
        # Two tensors a call.
        self.rng_state: list[torch.Tensor] = []

    def _given(self, call: _Varlen) -> Iterator[torch.Tensor]:
        yield self.query[call.queries].contiguous()
        yield self.key[call.keys].contiguous()
        yield self.value[call.keys].contiguous()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, D) and lse (heads, T) float32."""
        out: Any = None
        lse: Any = None
        for call in self.calls:
            lengths = (call.cu_seqlens_q, call.cu_seqlens_k, call.longest_query, call.longest_key)
            found, found_lse, *rng_state, _ = torch.ops.aten._flash_attention_forward(
                *self._given(call), *lengths, 0.0, call.causal, False, scale=self.scale
            )
            self.rng_state += rng_state
            if call.query_of is None:
                out, lse = found, found_lse
            else:
                out, lse = merge_attention(out, lse, found, found_lse, call.query_of)
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
