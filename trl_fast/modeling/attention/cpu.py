"""Computes attention of token trees by torch's flash kernel for the CPU."""

from __future__ import annotations

from typing import ClassVar

import torch

from .parts import Part
from .partwise import PartwiseAttention, hidden_keys
from .row_attention import AttentionSpec


class CpuRowAttention(PartwiseAttention):
    """Computes the parts of a row by torch's flash kernel for the CPU, one call each."""

    device_kind: ClassVar[str | None] = "cpu"

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns whether the kernel serves queries (1, heads, T, D) and values (1, ..., Dv), and why not."""
        if spec.softcap:
            return False, "flash kernels cap no scores"
        if query.shape[-1] != value.shape[-1]:
            return False, f"keys of {query.shape[-1]} and values of {value.shape[-1]} channels differ"
        return True, "torch's flash kernel for the CPU"

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def _mask(self, part: Part) -> torch.Tensor | None:
        """Returns what is added to the scores (t, K) of a part; None: nothing, or the kernel knows itself."""
        if part.is_triangle or not part.causal:
            return None
        shape = part.num_queries, part.num_keys
        if shape not in self._masks:
            mask = self.query.new_zeros(shape)
            hidden = hidden_keys(part, slice(0, shape[0]), slice(0, shape[1]), mask.device)
            self._masks[shape] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[shape]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output (G, R, t, Dv) and log-sum-exp (G, R, t) of queries (G, R, t, D), keys (G, R, K, D)."""
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, part.is_triangle, attn_mask=self._mask(part), scale=self.spec.scale
        )

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
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad, query, key, value, out, lse, 0.0, part.is_triangle),
            attn_mask=self._mask(part),
            scale=self.spec.scale,
        )
        return found[0], found[1].sum(dim=1), found[2].sum(dim=1)
