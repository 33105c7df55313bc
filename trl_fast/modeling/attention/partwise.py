"""Computes a row of token trees part by part; what computes one part, a class that extends this one says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch

from trl_fast.ops.attention_merge import merge_into
from trl_fast.ops.matmul import gemm_dtype

from .parts import Part, attention_parts, blocks_of, length
from .row_attention import AttentionSpec, RowAttention


def hidden_keys(part: Part, rows: slice, keys: slice, device: torch.device) -> torch.Tensor:
    """Returns which of a causal part's keys some of its queries do not attend to, (rows, keys) bool."""
    last = torch.arange(rows.start, rows.stop, device=device)[:, None] + (part.num_keys - part.num_queries)
    places = torch.arange(keys.start, keys.stop, device=device)
    return (places > last) if part.window is None else (places > last) | (places <= last - part.window)


def _in_order(part: Part, x: torch.Tensor, tokens: int = -2) -> torch.Tensor:
    """Returns what stands for tokens along a dimension in the order in which a part takes them, or in the row's."""
    return x.flip(tokens) if part.backwards else x


class PartwiseAttention(RowAttention):
    """Computes the parts of a row one by one, and merges them by their log-sum-exps.

    Key-value heads stand as the batch, so that their groups of query heads read them without a copy. Where 16-bit
    products are slow the numbers are float32. A windowed part is computed in blocks of a quarter of its window, so
    that few of the scores are masked ones.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        self.dtype, self.spec = query.dtype, spec
        query, key, value = (x.to(gemm_dtype(x)) for x in (query, key, value))
        self.query = self._grouped(query, key.shape[1])
        self.key, self.value = key[0], value[0]

    @staticmethod
    def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
        """Returns (1, heads, T, D) as (key-value heads, heads of a group, T, D)."""
        return x[0].unflatten(0, (groups, -1))

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part
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
        part: Part,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of one part's query (G, R, t, D) and, summed over a group, of key and value (G, K, D)."""

    def _parts(self) -> Iterator[tuple[Part, bool]]:
        """Yields the parts that are computed one by one, and whether results of their queries are there already."""
        window = self.spec.mask.window
        for number, group in enumerate(attention_parts(self.spec.mask)):
            for part in group:
                for block in blocks_of(part, min(max((window or 0) // 4, 32), 256)):
                    yield block, number > 0

    def _given(self, part: Part) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns query (G, R, t, D), key and value (G, R, K, D) of a part."""
        query = _in_order(part, self.query[:, :, part.queries])
        return query, self._joined(self.key, part), self._joined(self.value, part)

    def _joined(self, x: torch.Tensor, part: Part) -> torch.Tensor:
        """Returns the keys or values (G, R, K, D) of a part, from all of them (G, T, D); one range is not copied."""
        ranges = [x[:, keys] for keys in part.keys]
        joined = _in_order(part, ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=1))
        return joined[:, None].expand(-1, self.query.shape[1], -1, -1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, Dv) and lse (heads, T) float32."""
        rows_of = self.query.shape[:3]
        out = self.query.new_empty(*rows_of, self.value.shape[-1])
        lse = self.query.new_empty(rows_of, dtype=torch.promote_types(self.query.dtype, torch.float32))
        for part, merges in self._parts():
            rows = part.queries
            found, found_lse = self.attend(*self._given(part), part)
            found, found_lse = _in_order(part, found), _in_order(part, found_lse, -1)
            if merges:
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
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (self.query, self.key, self.value))
        for part, _ in self._parts():
            rows = part.queries
            upstream, result = (_in_order(part, x[:, :, rows]) for x in (grad, out))
            result_lse = _in_order(part, lse[:, :, rows], -1)
            gradients = self.attend_backward(upstream, *self._given(part), result, result_lse, part)
            found = [_in_order(part, x) for x in gradients]
            grad_query[:, :, rows] += found[0]
            for total, summand in zip((grad_key, grad_value), found[1:], strict=True):
                pieces = summand.split([*map(length, part.keys)], dim=1)
                for keys, piece in zip(part.keys, pieces, strict=True):
                    total[:, keys] += piece
        grad_query = grad_query.flatten(0, 1)[None]
        return grad_query.to(self.dtype), grad_key[None].to(self.dtype), grad_value[None].to(self.dtype)
