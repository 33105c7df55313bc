"""Computes attention of token trees on the CPU: by our compiled kernels, or by torch's flash kernel."""

from __future__ import annotations

import functools
import os
from typing import ClassVar

import torch

from trl_fast.data.segments import segments_of
from trl_fast.ops.attention import OP, TokenTable, row_attention, row_attention_backward
from trl_fast.ops.backends import ENVIRONMENT_VARIABLE, supports

from .parts import Part
from .partwise import PartwiseAttention, hidden_keys
from .row_attention import AttentionSpec, RowAttention, RowMask


@functools.lru_cache(maxsize=64)
def _table(mask: RowMask) -> TokenTable:
    """Returns which tokens of a row attend to which, as the op takes it."""
    segments = [n for s in segments_of(mask.trees) for n in (s.start, s.end, s.tree_end, s.offset)]
    runs = [token for run in mask.runs for token in run]
    return TokenTable(segments, runs, mask.whole_runs, mask.window or 0)


class CompiledRowAttention(RowAttention):
    """Computes a row in one call of our C++ kernels."""

    device_kind: ClassVar[str | None] = "cpu"

    @staticmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns whether the kernels serve queries (1, heads, T, D) and values (1, ..., Dv), and why not."""
        if os.environ.get(ENVIRONMENT_VARIABLE) == "torch":
            return False, f"{ENVIRONMENT_VARIABLE}=torch"
        return supports(OP, "cpp", query.device, query.dtype)

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        super().__init__(query, key, value, spec)
        self._given = query[0], key[0], value[0]
        self._choices = _table(spec.mask), spec.scale, spec.softcap or 0.0

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns out (1, heads, T, Dv) and lse (heads, T) float32."""
        out, lse = row_attention(*self._given, *self._choices, backend="cpp")
        return out[None], lse

    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of query, key and value, in their shapes."""
        found = row_attention_backward(grad[0], *self._given, out[0], lse, *self._choices, backend="cpp")
        return found[0][None], found[1][None], found[2][None]


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
