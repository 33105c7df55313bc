"""Checks what the divergence ops are given, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..head.logit_transform import LogitTransform
from ..validation import FLOATS, check_untargeted_head, values_are_checked

# What sums of rounded probabilities may exceed 1 by: bfloat16 log-probabilities are off by 0.4%.
_EXCESS = 1e-2


class HeadArguments(NamedTuple):
    """Holds a head as it is given: hidden (N, H), weight (V, H), bias (V,) or None, transform."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform


def check_heads(heads: Sequence[HeadArguments], vocab_size: int | None) -> tuple[list[torch.Tensor], int]:
    """Checks the student's head, and the teacher's after it if there is one.

    Returns their hidden states, in autocast's dtype if it is on, and how many columns count.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    found: list[torch.Tensor] = []
    for head, prefix in zip(heads, ("", "teacher_"), strict=False):
        hidden = check_untargeted_head(head.hidden, head.weight, head.bias, prefix)
        if found and len(hidden) != len(found[0]):
            raise ValueError(f"{prefix}hidden: expected {len(found[0])} rows as hidden has, got {len(hidden)}")
        if found and hidden.device != found[0].device:
            raise ValueError(f"{prefix}hidden: expected device {found[0].device}, got {hidden.device}")
        if head.transform.scale == 0:
            raise ValueError(f"{prefix}logit_scale: 0 makes every token equally likely; expected another number")
        found.append(hidden)
    return found, _columns([head.weight.shape[0] for head in heads], vocab_size)


def _columns(sizes: Sequence[int], vocab_size: int | None) -> int:
    """Returns how many columns count of heads of these vocabularies, the student's first."""
    if vocab_size is None and min(sizes) < max(sizes):
        raise ValueError(
            f"teacher_weight: its vocabulary has {sizes[1]} columns, the student's {sizes[0]}; if both have one "
            "tokenizer, give its size as vocab_size: the rest is padding"
        )
    if vocab_size is not None and (type(vocab_size) is not int or not 1 <= vocab_size <= min(sizes)):
        raise ValueError(f"vocab_size: expected 1 to the {min(sizes)} columns of the smaller head, got {vocab_size!r}")
    return min(sizes) if vocab_size is None else vocab_size


def check_rows(weights: torch.Tensor, hidden: torch.Tensor) -> None:
    """Checks the rows' weights (N,) beside hidden (N, H).

    Raises:
        ValueError: saying what they are and what was expected.
    """
    if tuple(weights.shape) != (hidden.shape[0],):
        raise ValueError(f"weights: expected shape ({hidden.shape[0]},), got {tuple(weights.shape)}")
    if weights.dtype not in FLOATS:
        raise ValueError(f"weights: expected a floating-point dtype, got {weights.dtype}; cast it with .float()")
    if weights.device != hidden.device:
        raise ValueError(f"weights: expected device {hidden.device} as hidden has, got {weights.device}")
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("weights: they have no gradient here; detach them")


def check_given(
    logprobs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None, hidden: torch.Tensor, vocab_size: int
) -> None:
    """Checks given log-probabilities and ids (N, K) of a vocabulary; rows of weights (N,) 0 may hold anything.

    Raises:
        ValueError: naming the argument and row, what it was and what was expected.
    """
    if logprobs.dim() != 2 or len(logprobs) != len(hidden) or not logprobs.shape[1]:
        raise ValueError(f"teacher_logprobs: expected shape ({len(hidden)}, K), got {tuple(logprobs.shape)}")
    if ids.shape != logprobs.shape:
        raise ValueError(f"teacher_ids: expected shape {tuple(logprobs.shape)}, got {tuple(ids.shape)}")
    if logprobs.dtype not in FLOATS:
        raise ValueError(f"teacher_logprobs: expected a floating-point dtype, got {logprobs.dtype}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"teacher_ids: expected an integer dtype, got {ids.dtype}")
    for name, tensor in (("teacher_logprobs", logprobs), ("teacher_ids", ids)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} as hidden has, got {tensor.device}")
    if not torch.compiler.is_compiling() and values_are_checked(logprobs):
        _check_values(logprobs.detach(), ids, weights, vocab_size)


def _check_values(logprobs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None, vocab_size: int) -> None:
    """Checks the values of given tokens (N, K) in the rows that count."""
    counts = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if weights is None else weights != 0
    known = (logprobs != float("-inf")) & counts[:, None]
    outside = known & ((ids < 0) | (ids >= vocab_size))
    # Padding becomes numbers of their own, below 0.
    alone = torch.where(known, ids, -1 - torch.arange(ids.shape[1], device=ids.device)).sort(dim=1).values
    total = torch.where(known, logprobs.double().exp(), 0.0).sum(dim=1)
    for bad, said in (
        (outside.any(dim=1), f"a token outside the vocabulary [0, {vocab_size})"),
        ((alone[:, 1:] == alone[:, :-1]).any(dim=1), "a token twice"),
        (counts & ~known.any(dim=1), "no token; give it weight 0"),
        (~(total <= 1 + _EXCESS), "probabilities of more than 1 in all, or NaN: are these logits?"),
    ):
        rows = bad.nonzero()
        if len(rows):
            raise ValueError(f"teacher_ids, teacher_logprobs: row {int(rows[0])} has {said}")
