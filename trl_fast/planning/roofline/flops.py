"""Counts operations of matrix products and attention, by their operands' shapes. All else counts in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .known_values import values_of

aten = torch.ops.aten


class Operations(NamedTuple):
    """Holds floating-point operations, whether their operands are wider than 16 bits, and a product's two factors."""

    flops: float
    float32: bool = False
    factors: tuple[torch.Tensor, ...] = ()


def flops_of(func: torch._ops.OpOverload, given: dict[str, Any]) -> Operations:
    """Returns the operations of an operator, given its arguments by name; none for what is no product."""
    formula = _FORMULAS.get(func.overloadpacket)
    return Operations(0.0) if formula is None else formula(given)


def _product(left: str, right: str) -> Callable[[dict[str, Any]], Operations]:
    """Counts the operations of (..., M, K) times (..., K, N): two for each of M·N·K."""

    def operations(given: dict[str, Any]) -> Operations:
        factors = (given[left], given[right])
        return Operations(2.0 * factors[0].numel() * factors[1].shape[-1], factors[0].dtype.itemsize > 2, factors)

    return operations


def _attention(products: int) -> Callable[[dict[str, Any]], Operations]:
    """Counts products of queries with keys, or of their weights with values; causal ones of half the pairs, those with
    a window of the pairs in it.
    """

    def operations(given: dict[str, Any]) -> Operations:
        query, causal = given["query"], given.get("is_causal", False)
        left = given.get("window_size_left")
        window = None if left is None or left < 0 else left + 1
        flops = 2.0 * products * query.shape[-1] * _heads_times_pairs(given, window)
        return Operations(flops / 2 if causal and window is None else flops, query.dtype.itemsize > 2)

    return operations


def _heads_times_pairs(given: dict[str, Any], window: int | None) -> float:
    """Counts pairs of a query and a key in all heads: of (B, heads, T, D), or of sequences in a row (T, heads, D).

    Where the sequences' starts are not known, all are taken to be as long as the longest. window: how many keys a
    query of a sequence in a row sees at most, the last query up to the last key.
    """
    query, key, cu_seqlens = given["query"], given["key"], given.get("cum_seq_q")
    if cu_seqlens is None:
        return float(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
    cu_seqlens_q, cu_seqlens_k = values_of(given["cum_seq_q"]), values_of(given["cum_seq_k"])
    with unset_fake_temporarily():
        if cu_seqlens_q is None or cu_seqlens_k is None:
            of_queries, of_keys = (
                torch.full((len(cu_seqlens) - 1,), longest, dtype=torch.float64)
                for longest in (given["max_q"], given["max_k"])
            )
        else:
            of_queries, of_keys = cu_seqlens_q.double().diff(), cu_seqlens_k.double().diff()
        if window is None:
            return query.shape[1] * float(of_queries @ of_keys)
        seen = _pairs_up_to(of_keys, window) - _pairs_up_to((of_keys - of_queries).clamp(min=0), window)
        return query.shape[1] * float(seen.sum())


def _pairs_up_to(keys: torch.Tensor, window: int) -> torch.Tensor:
    """Counts the pairs of the first `keys` tokens of sequences (N,) float64, each of which sees so many before it."""
    short = keys.clamp(max=window)
    return short * (short + 1) / 2 + (keys - short) * window


_FORMULAS = {
    aten.mm: _product("self", "mat2"),
    aten.bmm: _product("self", "mat2"),
    aten.addmm: _product("mat1", "mat2"),
    aten.addmm_: _product("mat1", "mat2"),
    aten.baddbmm: _product("batch1", "batch2"),
    aten.baddbmm_: _product("batch1", "batch2"),
    aten._flash_attention_forward: _attention(2),
    aten._flash_attention_backward: _attention(5),
    aten._scaled_dot_product_flash_attention: _attention(2),
    aten._scaled_dot_product_flash_attention_backward: _attention(5),
    aten._scaled_dot_product_efficient_attention: _attention(2),
    aten._scaled_dot_product_efficient_attention_backward: _attention(5),
}
