"""Computes exact attention over a row of token trees, a prompt once, whatever the number of its branches.

Every segment attends to itself, causally; all that continues a segment, as one block of queries, attends to the whole
of it. The tokens of an image may attend to all of it: what stands behind each of them is one more causal block, read
backwards. The partial results of a token are merged by their log-sum-exps, as the blocks of FlashAttention are (arXiv
2205.14135, section 3.1). A flash backward needs of the forward pass only the output and the log-sum-exp of the whole
softmax, so the same kernels give exact gradients part by part, from the merged ones. On a CPU our own kernels take the
whole row in one call (ops/attention.py).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from trl_fast.data.segments import TreeLengths, num_tokens
from trl_fast.ops.device import device_facts
from trl_fast.ops.named_gradients import first_derivative, gradients_of, needs_gradients

from .cpu import CompiledRowAttention, CpuRowAttention
from .flex import FlexAttention
from .parts import longest_sequence, run_across_segments
from .plain import PlainRowAttention
from .row_attention import AttentionSpec, RowAttention, RowMask
from .sinks import sink_gradient, with_sinks
from .varlen import CudaRowAttention

logger = logging.getLogger(__name__)

# What computes a row, the fastest first; the last one serves everything.
KERNELS: tuple[type[RowAttention] | type[FlexAttention], ...] = (
    CudaRowAttention,
    FlexAttention,
    CompiledRowAttention,
    CpuRowAttention,
    PlainRowAttention,
)


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: tuple[TreeLengths, ...],
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    image_runs: tuple[tuple[int, int], ...] = (),
    whole_runs: bool = False,
) -> torch.Tensor:
    """Computes attention of every token to its own sequence up to itself: its segment, and those that this continues.

    Args:
        query: (1, heads, T, D); key: (1, key-value heads, T, D); value: (1, key-value heads, T, Dv); of one float
            dtype. Key-value heads are not repeated.
        trees: lengths of the row's segments, summing to T.
        scale: of the scores; 1/√D if None.
        softcap: of the scores, as in `AttentionSpec`; window, image_runs and whole_runs: of the tokens, as in
            `RowMask`.
        sinks: (heads,), any float dtype: a score of each head beside those of the keys, with a value of 0; see
            sinks.py.

    Returns:
        (1, heads, T, Dv), differentiable; the sinks have a gradient too.

    Raises:
        ValueError: as of `attend`, or the window is shorter than one token.
    """
    mask = RowMask(trees, window, image_runs, whole_runs)
    return attend(query, key, value, attention_spec(query, mask, scale, softcap), sinks)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes attention (1, heads, T, Dv) as `tree_attention` does, from a spec that `attention_spec` made.

    query: (1, heads, T, D); key, value: (1, key-value heads, T, D or Dv); sinks: (heads,).

    Raises:
        ValueError: the lengths do not sum to T, or the heads of the queries are no multiple of those of the keys, or a
            run of images does not lie within a segment.
    """
    tokens, heads, groups = query.shape[2], query.shape[1], key.shape[1]
    if (total := sum(map(num_tokens, spec.mask.trees))) != tokens:
        raise ValueError(f"trees: lengths sum to {total}, the row has {tokens} tokens")
    if heads % groups:
        raise ValueError(f"query: {heads} heads are no multiple of the {groups} key-value heads")
    if (wrong := run_across_segments(spec.mask)) is not None:
        raise ValueError(f"image_runs: tokens {wrong[0]} to {wrong[1] - 1} do not lie within one segment of the row")
    kernels = choose_kernels(query, value, spec)
    if issubclass(kernels, FlexAttention):
        out, lse = kernels.attention(query, key, value, spec)
        return out if sinks is None else with_sinks(out, lse, sinks)[0]
    attended = kernels.eager_attention(query, key, value, spec) if sinks is None else None
    return _TreeAttention.apply(query, key, value, sinks, spec, kernels) if attended is None else attended


def attention_spec(
    query: torch.Tensor, mask: RowMask, scale: float | None = None, softcap: float | None = None
) -> AttentionSpec:
    """Returns the spec of a row of queries (1, heads, T, D); a window that holds every sequence is none.

    Raises:
        ValueError: the window is shorter than one token.
    """
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"window: {mask.window} tokens; a token attends at least to itself")
    if mask.window is not None and mask.window >= longest_sequence(mask.trees):
        mask = mask._replace(window=None)
    return AttentionSpec(mask, query.shape[-1] ** -0.5 if scale is None else scale, softcap or None)


def choose_kernels(
    query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> type[RowAttention] | type[FlexAttention]:
    """Returns the class that computes a row of queries (1, heads, T, D) and values (1, ..., T, Dv) of any float dtype.

    That it is plain PyTorch on a GPU is logged, in training alone: what a model is tried out with may not have its
    autocast yet.
    """
    kernels, refused = _first_that_serves(query, value, spec)
    if kernels is PlainRowAttention and query.is_cuda and query.requires_grad:
        _say_it_is_plain("; ".join(refused))
    return kernels


def fused_kernels_serve(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> bool:
    """Returns whether a row of queries (1, heads, T, D) and values (1, ..., T, Dv) needs no plain PyTorch."""
    return _first_that_serves(query, value, spec)[0] is not PlainRowAttention


def _first_that_serves(
    query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> tuple[type[RowAttention] | type[FlexAttention], list[str]]:
    """Returns the first of `KERNELS` that serves, and why those before it for the device do not."""
    kind = device_facts(query.device).kind
    refused: list[str] = []
    for kernels in KERNELS:
        if kernels.device_kind in (None, kind):
            serves, reason = kernels.supports(query, value, spec)
            if serves:
                return kernels, refused
            refused.append(reason)
    raise AssertionError("plain PyTorch serves everything")


@functools.cache
def _say_it_is_plain(reason: str) -> None:
    """Logs a reason once."""
    logger.warning(f"Attention runs in plain PyTorch, which is slower on long rows: {reason}.")


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
        spec: AttentionSpec,
        kernels: type[RowAttention],
    ) -> torch.Tensor:
        row = kernels(query, key, value, spec)
        out, lse = row.forward()
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        # All tensors, so that checkpointing lets go of them.
        ctx.save_for_backward(query, key, value, sinks, out, lse, *row.rng_state)
        ctx.spec, ctx.kernels = spec, kernels
        return out

    @staticmethod
    @first_derivative("attention of token trees")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, out, lse, *rng_state = ctx.saved_tensors
        row = ctx.kernels(query, key, value, ctx.spec)
        row.rng_state = rng_state
        found = dict(zip(("query", "key", "value"), row.backward(grad, out, lse), strict=True))
        if needs_gradients(ctx, _TreeAttention.forward, "sinks")[0]:
            found["sinks"] = sink_gradient(grad, out, lse, sinks)
        return gradients_of(_TreeAttention.forward, **found)
