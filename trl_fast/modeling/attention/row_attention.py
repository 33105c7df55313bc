"""Says what is computed of a row of token trees, and what a class must offer that computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from trl_fast.data.segments import TreeLengths


class RowMask(NamedTuple):
    """Tells which tokens of a row of T tokens attend to which: each to its sequence up to itself.

    - `trees`: lengths of the row's segments, summing to T.
    - `window`: the last tokens of its sequence that a token attends to, itself included; None: all.
    - `runs`: start and end, in the row, of tokens that also attend to those of the run behind themselves, as the
      tokens of an image do in Gemma 3. A run lies within a segment; runs are in order and do not overlap.
    - `whole_runs`: whether the tokens of a run attend to all of it, even where it is longer than the window.
    """

    trees: tuple[TreeLengths, ...]
    window: int | None = None
    runs: tuple[tuple[int, int], ...] = ()
    whole_runs: bool = False


class AttentionSpec(NamedTuple):
    """Describes the attention of a row of T tokens.

    - `mask`: which tokens attend to which.
    - `scale`: of the scores.
    - `softcap`: scores become softcap · tanh(scores / softcap) (Gemma 2, arXiv 2408.00118, section 2). None: as they
      are.
    """

    mask: RowMask
    scale: float
    softcap: float | None = None


class RowKernels(ABC):
    """Says which rows some kernels serve."""

    # The kind of device that they are for; None: any.
    device_kind: ClassVar[str | None] = None

    @staticmethod
    @abstractmethod
    def supports(query: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> tuple[bool, str]:
        """Returns whether they serve queries (1, heads, T, D) and values (1, key-value heads, T, Dv) on their device,
        and why not.
        """

    @staticmethod
    def eager_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor | None:
        """Returns differentiable attention (1, heads, T, Dv) whose backward pass is in C++; None: there is none.

        query: (1, heads, T, D); key, value: (1, key-value heads, T, D or Dv).
        """
        return None


class RowAttention(RowKernels):
    """Computes the attention of one row, forward and backward, without recording gradients.

    It is made with query (1, heads, T, D), key (1, key-value heads, T, D), value (1, key-value heads, T, Dv), and the
    spec; in backward a new one is made of the same. rng_state: tensors that backward needs beside the results.
    """

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec) -> None:
        self.rng_state: Sequence[torch.Tensor] = ()

    @abstractmethod
    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the output (1, heads, T, Dv) and the log-sum-exp of the scores (heads, T), float32 at least."""

    @abstractmethod
    def backward(
        self, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns gradients of query, key and value, in their shapes, from those of the output (1, heads, T, Dv).

        out (1, heads, T, Dv) and lse (heads, T) are the results of the whole softmax, which may have had more keys.
        """
