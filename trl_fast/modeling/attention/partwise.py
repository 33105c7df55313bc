"""Computes a row of token trees part by part; what computes one part, a class that extends this one says."""

from __future__ import annotations

from abc import abstractmethod

import torch

from trl_fast.ops.attention_merge import merge_into
from trl_fast.ops.matmul import gemm_dtype

from .parts import attention_parts
from .row_attention import AttentionSpec, RowAttention


class PartwiseAttention(RowAttention):
    """Computes the parts of a row one by one, and merges them by their log-sum-exps.

    Key-value heads stand as the batch, so that their groups of query heads read them without a copy. Where 16-bit
    products are slow the numbers are float32.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        groups = key.shape[1]
        self.dtype = query.dtype
        query, key, value = (x.to(gemm_dtype(x)) for x in (query, key, value))
        self.query = self._grouped(query, groups)
        self.key, self.value = (x[0][:, None].expand(-1, self.query.shape[1], -1, -1) for x in (key, value))
        self.groups_of_parts, self.spec = attention_parts(spec.trees), spec

    @staticmethod
    def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
        """Returns (1, heads, T, D) as (key-value heads, heads of a group, T, D)."""
        return x[0].unflatten(0, (groups, -1))

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output (G, R, t, Dv) and log-sum-exp (G, R, t) of queries (G, R, t, D), keys (G, R, K, D)."""

    @abstractmethod
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

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, Dv) and lse (heads, T) float32."""
        rows_of = self.query.shape[:3]
        out = self.query.new_empty(*rows_of, self.value.shape[-1])
        lse = self.query.new_empty(rows_of, dtype=torch.promote_types(self.query.dtype, torch.float32))
        for number, group in enumerate(self.groups_of_parts):
            for rows, keys, causal in group:
                found, found_lse = self.attend(
                    self.query[:, :, rows], self.key[:, :, keys], self.value[:, :, keys], causal
                )
                if number:
                    merge_into(out[:, :, rows], lse[:, :, rows], found, found_lse)
                else:
                    out[:, :, rows], lse[:, :, rows] = found, found_lse
        return out.flatten(0, 1)[None].to(self.dtype), lse.flatten(0, 1)

    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of query, key and value, in their shapes."""
        lse = lse.unflatten(0, self.query.shape[:2])
        grad, out = (self._grouped(x.to(self.query.dtype), self.query.shape[0]) for x in (grad, out))
        grad_query = torch.zeros_like(self.query)
        grad_key, grad_value = (x.new_zeros(x.shape[0], *x.shape[2:]) for x in (self.key, self.value))
        for group in self.groups_of_parts:
            for rows, keys, causal in group:
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
