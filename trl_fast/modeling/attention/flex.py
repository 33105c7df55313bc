"""Computes attention of a row of token trees by FlexAttention, which torch compiles to Triton kernels for CUDA.

It serves what flash kernels do not take: heads wider than 256 channels, capped scores, float32, values of another
width than the keys. One compiled function serves rows of all lengths, with and without windows: the mask is data. What
is compiled apart: other widths, numbers of heads, dtypes, scales and caps, and passes without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.attention.flex_attention import BlockMask as TorchBlockMask

from trl_fast.data.segments import num_tokens
from trl_fast.input_errors import error_line
from trl_fast.ops.device import device_facts

from .block_masks import BLOCK, BlockMask, block_mask, visible_pairs
from .flex_tiles import kernel_tiles
from .row_attention import AttentionSpec, RowKernels, RowMask

# Compiled functions of one process; torch's own limit, 8, is less than a policy, its reference and a trial run need.
_MOST_COMPILED = 64
# Rows of fewer tokens are done in plain PyTorch before anything is compiled: those that a model is tried out with.
_SHORTEST = 512
# The narrowest channels that Triton multiplies.
_NARROWEST = 16
# A row that is tried out: trees of two and three levels, whole blocks and parts of them, a run.
_TRIAL = RowMask(((300, 100, (40, 30, 60)), (200, 33)), runs=((50, 190),))
# Relative errors in the 2-norm beyond this are no rounding, not even of bfloat16.
_TRIAL_ERROR = 0.03


class FlexAttention(RowKernels):
    """Computes a row by FlexAttention; autograd records it as it is."""

    device_kind: ClassVar[str | None] = "cuda"

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns whether it serves queries (1, heads, T, D) and values (1, key-value heads, T, Dv), and why not.

        The first time that it is asked on a GPU it is compiled for what it is asked about, and tried out on a short
        row.
        """
        facts, widths = device_facts(query.device), (query.shape[-1], value.shape[-1])
        if min(widths) < _NARROWEST:
            return False, f"FlexAttention takes heads of {_NARROWEST} channels at least, not {min(widths)}"
        if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return False, f"FlexAttention takes no {query.dtype}"
        if facts.capability < (8, 0):
            return False, "the GPU is older than FlexAttention's kernels"
        if query.shape[2] < _SHORTEST:
            return False, f"FlexAttention is not compiled for rows of fewer than {_SHORTEST} tokens"
        if facts.flex_attention is None:
            heads = query.shape[1], value.shape[1]
            reason = _trial(_Kind(query.device, query.dtype, *heads, *widths, spec.scale, spec.softcap))
            if reason is not None:
                return False, reason
        return True, "torch's FlexAttention, compiled to Triton kernels"

    @staticmethod
    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes attention (1, heads, T, Dv) and the log-sum-exp of the scores (heads, T), differentiable once.

        query: (1, heads, T, D); key: (1, key-value heads, T, D); value: (1, key-value heads, T, Dv); of one dtype.
        """
        facts = device_facts(query.device)
        if facts.flex_attention is not None:
            out, lse = facts.flex_attention(query, key, value, visible_pairs(spec.mask))
        else:
            mask = block_mask(spec.mask, query.device, facts)
            for states in (query, key, value):
                torch._dynamo.maybe_mark_dynamic(states, 2)
            with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
                out, lse = _compiled()(query, key, value, mask, spec.scale, spec.softcap)
        return out, lse[0]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes output (1, heads, T, Dv) and log-sum-exp (1, heads, T); compiled, its arguments are as above."""

    def sees(_batch: Any, _head: Any, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return (column <= mask.last[row]) & (row < mask.ends[column]) & (mask.positions[column] >= mask.oldest[row])

    def capped(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    tokens = query.shape[2]
    options: Any = {"BACKEND": "TRITON", **kernel_tiles(max(query.shape[-1], value.shape[-1]), query.dtype)}
    out, aux = flex_attention(
        query,
        key,
        value,
        capped if softcap else None,
        TorchBlockMask((tokens, tokens), *mask.blocks, (BLOCK, BLOCK), sees),
        scale,
        enable_gqa=True,
        kernel_options=options,
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None  # it was asked for
    return out, aux.lse


@functools.cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Returns the compiled function. What is not marked as dynamic, such as the scale, is a constant of its code."""
    return torch.compile(_attend, dynamic=False, fullgraph=True)


class _Kind(NamedTuple):
    """Holds what a function is compiled for: but for the length, all that decides whether it works."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    groups: int
    width: int
    value_width: int
    scale: float
    softcap: float | None


@functools.cache
def _trial(kind: _Kind) -> str | None:
    """Compiles for a kind, compares output and gradients with plain scores, and returns what is wrong."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind.device.type, enabled=False):
            error = _trial_error(kind)
    except torch.OutOfMemoryError:
        raise
    # Whatever a compiler raises: there is another way to compute the same.
    except Exception as raised:
        return f"FlexAttention could not be compiled or run ({error_line(raised)})"
    # Not a number is no number.
    return None if error <= _TRIAL_ERROR else f"FlexAttention's numbers are off by {error:.2g} on a short row"


def _trial_error(kind: _Kind) -> float:
    """Returns the largest relative error, in the 2-norm, of the output and the three gradients of a short row."""
    generator, tokens = torch.Generator(kind.device).manual_seed(0), sum(map(num_tokens, _TRIAL.trees))
    sizes = ((kind.heads, kind.width), (kind.groups, kind.width), (kind.groups, kind.value_width))
    options: dict[str, Any] = {"device": kind.device, "dtype": kind.dtype, "generator": generator}
    # As models have them: a token's heads side by side.
    made = [torch.randn(1, tokens, *size, **options).transpose(1, 2).requires_grad_() for size in sizes]
    query, key, value = states = tuple(made)
    mask = block_mask(_TRIAL, kind.device, device_facts(kind.device))
    out, _ = FlexAttention.attention(query, key, value, AttentionSpec(_TRIAL, kind.scale, kind.softcap))
    upstream = torch.randn(out.shape, **options)
    exact = _plain_attention(query, key, value, mask, kind.scale, kind.softcap)
    got, wanted = (
        (given.detach(), *torch.autograd.grad(given, states, upstream.to(given.dtype))) for given in (out, exact)
    )
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, wanted, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> torch.Tensor:
    """Computes attention (1, heads, T, Dv) in float32 by the scores of all pairs of tokens."""
    place = torch.arange(query.shape[2], device=query.device)
    sees = (place <= mask.last[:, None]) & (place[:, None] < mask.ends) & (mask.positions >= mask.oldest[:, None])
    key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float() for states in (key, value))
    scores = query.float() @ key.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return scores.masked_fill(~sees, float("-inf")).softmax(-1) @ value
