"""Computes attention of token trees by plain PyTorch, on any device, a tile of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .parts import Part
from .partwise import PartwiseAttention, hidden_keys
from .row_attention import AttentionSpec

# Most bytes of scores that stand at once.
_TILE_BYTES = 1 << 27


class PlainRowAttention(PartwiseAttention):
    """Computes the parts of a row by plain PyTorch on any device, a tile of queries at a time.

    Scores of `_TILE_BYTES` exist at once, in forward and in backward.
    """

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns that it serves queries (1, heads, T, D) and values (1, ..., Dv) of any kind."""
        return True, "plain PyTorch serves everything"

    def _tiles(self, part: Part) -> Iterator[tuple[slice, slice]]:
        """Yields tiles of a part's queries, each with the keys that its last one sees."""
        heads, tokens, keys = self.query.shape[0] * self.query.shape[1], part.num_queries, part.num_keys
        step = max(_TILE_BYTES // (4 * heads * keys), 1)
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            yield slice(start, end), slice(0, keys - tokens + end if part.causal else keys)

    @staticmethod
    def _products(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns (G, R, t, D) times (G, R, K, D) transposed, one for all R heads of a group: (G, R, t, K)."""
        return (rows.flatten(1, 2) @ keys[:, 0].transpose(-1, -2)).unflatten(1, rows.shape[1:3])

    def _scores(self, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scores = self._products(query, key).to(dtype) * self.spec.scale
        return scores if self.spec.softcap is None else self.spec.softcap * torch.tanh(scores / self.spec.softcap)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output (G, R, t, Dv) and log-sum-exp (G, R, t) of queries (G, R, t, D), keys (G, R, K, D)."""
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, keys in self._tiles(part):
            scores = self._scores(query[:, :, rows], key[:, :, keys], lse.dtype)
            if part.causal:
                scores.masked_fill_(hidden_keys(part, rows, keys, query.device), float("-inf"))
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
        part: Part,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of one part's query (G, R, t, D) and, summed over a group, of key and value (G, K, D)."""
        grad_query, dtype = torch.empty_like(query), query.dtype
        grad_key, grad_value = (lse.new_zeros(x.shape[0], *x.shape[2:]) for x in (key, value))
        delta = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)
        for rows, keys in self._tiles(part):
            scores = self._scores(query[:, :, rows], key[:, :, keys], lse.dtype)
            weights = (scores - lse[:, :, rows, None]).exp_()
            if part.causal:
                weights.masked_fill_(hidden_keys(part, rows, keys, query.device), 0.0)
            upstream = grad[:, :, rows]
            grad_value[:, keys] += weights.to(dtype).flatten(1, 2).transpose(-1, -2) @ upstream.flatten(1, 2)
            weights *= self._products(upstream, value[:, :, keys]).to(lse.dtype) - delta[:, :, rows]
            if self.spec.softcap is not None:
                weights *= 1 - (scores / self.spec.softcap).square_()
            weights = (weights * self.spec.scale).to(dtype)
            grad_query[:, :, rows] = self._products(weights, key[:, :, keys].transpose(-1, -2))
            grad_key[:, keys] += weights.flatten(1, 2).transpose(-1, -2) @ query[:, :, rows].flatten(1, 2)
        return grad_query, grad_key, grad_value
