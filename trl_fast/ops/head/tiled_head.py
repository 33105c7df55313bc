"""Holds the head that a sweep goes over: its weight, bias and transform, the plan and the row kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory_pool import pooled_empty
from .logit_transform import LogitTransform
from .plan import HeadPlan
from .row_kernels import RowKernels
from .vocabulary_shard import VocabularyShard


@dataclass(eq=False)
class TiledHead:
    """Holds a head's tensors, with the plan that its sweeps follow. Nothing here has a gradient of its own.

    weight: (V, H) any float dtype; bias: (V,) or None; kernels: the backend's row kernels; vocab_size: columns of the
    whole head; shard: which of them these are, None if they are all.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform
    plan: HeadPlan
    kernels: RowKernels
    vocab_size: int
    shard: VocabularyShard | None = None
    _cast_weight: torch.Tensor | None = None

    def cast_tile(self, columns: slice) -> torch.Tensor:
        """Returns rows `columns` of the weight, (C, H), cast to the product's dtype; valid until the next call.

        A weight that is cast as a whole is cast once.
        """
        dtype = self.plan.product_dtype
        if self.plan.casts_whole:
            if self._cast_weight is None:
                self._cast_weight = self.weight.to(dtype)
            return self._cast_weight[columns]
        tile = self.weight[columns]
        if self._cast_weight is None or self._cast_weight.shape[0] < tile.shape[0]:
            self._cast_weight = pooled_empty(tile.shape, dtype, self.weight.device)
        return self._cast_weight[: tile.shape[0]].copy_(tile)
