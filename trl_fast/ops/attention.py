"""Computes attention over a row of token trees in one call, without recording gradients.

A token attends to its sequence up to itself: its own segment, and those that this one continues. The softmax runs over
all of a token's keys at once, block after block (FlashAttention, arXiv 2205.14135, algorithm 1), so nothing has to be
merged. Backward needs output and log-sum-exp only, which may be those of a softmax with more keys, as with sinks.

With P = exp(S - lse), where S are the scores and dO the gradient of the output O: dV = Pᵀ dO,
dS = scale · P · (dO Vᵀ - Σ dO O), dQ = dS K, dK = dSᵀ Q; with capped scores S = c tanh(S'/c), dS has the factor
1 - (S/c)² too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .backends import choose_backend
from .device import device_facts

OP = "row_attention"


class TokenTable(NamedTuple):
    """Tells which tokens of a row attend to which, in plain numbers.

    - `segments`: of each segment, in the order of the row: start, end, where the last segment that continues it ends,
      and how many tokens of its sequence stand before it.
    - `runs`: start and end of each run, tokens that also attend to those of their run behind themselves; in the order
      of the row, none within another.
    - `whole_runs`: whether they attend to all of their run even where the window ends.
    - `window`: the last tokens of its sequence that a token attends to, itself included; 0: all.
    """

    segments: Sequence[int]
    runs: Sequence[int] = ()
    whole_runs: bool = False
    window: int = 0


def _check_table(table: TokenTable, tokens: int) -> None:
    """Raises ValueError if a table is not that of a row of so many tokens; the kernels check the same."""
    segments, runs, _, window = table
    if len(segments) % 4:
        raise ValueError(f"segments: expected four numbers a segment, got {len(segments)}")
    if len(runs) % 2:
        raise ValueError(f"runs: expected two numbers a run, got {len(runs)}")
    next_token, tree_ends = 0, list[int]()  # of the segments that the next one may continue
    for n, (start, end, tree_end, offset) in enumerate(zip(*(segments[i::4] for i in range(4)), strict=True)):
        if not next_token == start <= end <= tree_end <= tokens:
            raise ValueError(f"segments: number {n} does not stand behind the one before")
        if not 0 <= offset <= start:
            raise ValueError(
                f"segments: number {n} has {offset} tokens of its sequence before it, the row has {start}"
            )
        while tree_ends and tree_ends[-1] <= start:
            tree_ends.pop()
        if tree_ends and tree_end > tree_ends[-1]:
            raise ValueError(f"segments: number {n} ends behind one that it continues")
        tree_ends.append(tree_end)
        next_token = end
    if next_token != tokens:
        raise ValueError(f"segments: they have {next_token} tokens, the row has {tokens}")
    last_end = 0
    for n, (start, end) in enumerate(zip(runs[::2], runs[1::2], strict=True)):
        if start < 0 or end > tokens:
            raise ValueError(f"runs: number {n} leaves the row")
        if start < last_end:
            raise ValueError(f"runs: number {n} begins before the end of the one before")
        last_end = max(start, end)
    if window < 0:
        raise ValueError(f"window: expected tokens, or 0 for all, got {window}")


def _visible(segments: Sequence[int], runs: Sequence[int], whole_runs: bool, window: int, tokens: int) -> torch.Tensor:
    """Returns which keys a token attends to, (T, T) bool."""
    positions, firsts = torch.zeros(tokens, dtype=torch.long), torch.arange(tokens)
    ends, visible = firsts + 1, torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, tree_end, offset in zip(*(segments[i::4] for i in range(4)), strict=True):
        positions[start:end] = torch.arange(offset, offset + end - start)
        visible[start:tree_end, start:end] = True
    for start, end in zip(runs[::2], runs[1::2], strict=True):
        run = slice(start, max(start, end))
        ends[run] = end
        if whole_runs:
            firsts[run] = start
    keys = torch.arange(tokens)
    near = (positions[:, None] - positions < (window or tokens)) | (keys >= firsts[:, None])
    return visible & near & (keys < ends[:, None])


def _upcast(query: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Returns tensors (heads or key heads, T, D) in float32 at least, key heads repeated for the queries'."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return [x.to(dtype).repeat_interleave(len(query) // len(x), dim=0) for x in (query, *others)]


def _scores(
    query: torch.Tensor, key: torch.Tensor, table: TokenTable, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns scores (heads, T, T), -∞ where nothing is seen, and their derivative by scale · query · key."""
    _check_table(table, query.shape[1])
    scores = query @ key.transpose(-1, -2) * scale
    derivative = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        derivative -= (scores / softcap).square()
    visible = _visible(*table, query.shape[1]).to(query.device)
    return scores.masked_fill(~visible, float("-inf")), derivative


@torch.library.custom_op("trl_fast::row_attention", mutates_args=())
def _row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Sequence[int],
    runs: Sequence[int],
    whole_runs: bool,
    window: int,
    scale: float,
    softcap: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty_results(query, value)
    table = TokenTable(segments, runs, whole_runs, window)
    if choose_backend(OP, backend, device_facts(query.device), query.dtype) == "torch":
        q, k, v = _upcast(query, key, value)
        scores = _scores(q, k, table, scale, softcap)[0]
        return out.copy_(scores.softmax(-1) @ v), lse.copy_(scores.logsumexp(-1))
    given = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    torch.ops.trl_fast.row_attention_forward(*given, *table, scale, softcap, out, lse)
    return out, lse


def _empty_results(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[-1]).transpose(0, 1)
    return out, query.new_empty(heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))


@_row_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_results(query, value)


def _empty_gradients(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns room for gradients of tensors (heads, T, D), views of contiguous (T, heads, D)."""
    return tuple(x.new_empty(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1) for x in given)


def _gradients_reference(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: TokenTable,
    scale: float,
    softcap: float,
) -> list[torch.Tensor]:
    q, k, v, dout, o = _upcast(query, key, value, grad, out)
    scores, derivative = _scores(q, k, table, scale, softcap)
    weights = (scores - lse[..., None]).exp()
    by_scores = scale * weights * (dout @ v.transpose(-1, -2) - (dout * o).sum(-1, keepdim=True)) * derivative
    found = by_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dout
    return [by_scores @ k, *(x.unflatten(0, (len(key), -1)).sum(1) for x in found)]


@torch.library.custom_op("trl_fast::row_attention_backward", mutates_args=())
def _row_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Sequence[int],
    runs: Sequence[int],
    whole_runs: bool,
    window: int,
    scale: float,
    softcap: float,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_query, by_key, by_value = _empty_gradients(query, key, value)
    table = TokenTable(segments, runs, whole_runs, window)
    if choose_backend(OP, backend, device_facts(query.device), query.dtype) == "torch":
        found = _gradients_reference(grad, query, key, value, out, lse, table, scale, softcap)
        return by_query.copy_(found[0]), by_key.copy_(found[1]), by_value.copy_(found[2])
    given = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, query, key, value, out))
    torch.ops.trl_fast.row_attention_gradients(
        *given, lse.contiguous(), *table, scale, softcap, by_query, by_key, by_value
    )
    return by_query, by_key, by_value


@_row_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    by_query, by_key, by_value = _empty_gradients(query, key, value)
    return by_query, by_key, by_value


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dim() != 3 or not query.is_floating_point():
        raise ValueError(f"query: expected floats of shape (heads, T, D), got {query.dtype} {tuple(query.shape)}")
    heads, tokens, width = query.shape
    if not heads:
        raise ValueError(f"query: expected one head or more, got shape {tuple(query.shape)}")
    if key.dim() != 3 or key.shape[1:] != (tokens, width) or not len(key) or heads % len(key):
        raise ValueError(
            f"key: expected shape (key heads, {tokens}, {width}), of which {heads} heads are a multiple, "
            f"got {tuple(key.shape)}"
        )
    if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value: expected shape ({len(key)}, {tokens}, Dv), got {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")


def row_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: TokenTable,
    scale: float,
    softcap: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention of a row of T tokens.

    Args:
        query: (heads, T, D); key: (key heads, T, D); value: (key heads, T, Dv): of one float dtype and any strides;
            heads a multiple of key heads, each of which serves as many query heads in a row.
        table: which tokens attend to which.
        scale: of the scores; softcap: scores become softcap · tanh(scores / softcap); 0: as they are.
        backend: "cpp" or "torch", which builds the scores (heads, T, T); None: the first that serves.

    Returns:
        The output (heads, T, Dv), dtype of query, a view of a contiguous (T, heads, Dv); and the log-sum-exp of the
        scores (heads, T), float32 at least. Without a gradient formula: `row_attention_backward` is called for it.
        A token that has a score of NaN or +∞ has NaN as output, as softmax gives. Its log-sum-exp is NaN by "cpp", so
        that all gradients of what it sees are NaN, as by autograd; by "torch" it is +∞ in the second case.

    Raises:
        ValueError: a shape, a dtype or the table is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    _check(query, key, value)
    return _row_attention(query, key, value, *table, scale, softcap, backend)


def row_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: TokenTable,
    scale: float,
    softcap: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of query, key and value from that of the output.

    Args:
        grad: (heads, T, Dv), dtype of query, any strides.
        out: (heads, T, Dv), dtype of query; lse: (heads, T), float32 at least: the results of the whole softmax,
            which may have had more keys.
        The rest as for `row_attention`.

    Returns:
        Gradients in the shapes and dtype of query, key and value, views of contiguous (T, heads or key heads, D).

    Raises:
        ValueError: a shape or dtype is not as above.
        RuntimeError: the forced backend cannot serve; the message says why.
    """
    _check(query, key, value)
    shape = (*query.shape[:2], value.shape[-1])
    for name, x in (("grad", grad), ("out", out)):
        if x.shape != shape or x.dtype != query.dtype:
            raise ValueError(f"{name}: expected {query.dtype} of shape {shape}, got {x.dtype} {tuple(x.shape)}")
    if lse.shape != shape[:2]:
        raise ValueError(f"lse: expected shape {shape[:2]}, got {tuple(lse.shape)}")
    return _row_attention_backward(grad, query, key, value, out, lse, *table, scale, softcap, backend)
