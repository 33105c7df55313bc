"""Holds one head of a divergence, and what multiplies with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..device import device_facts
from ..head.logit_transform import LogitTransform
from ..head.plan import CPU_TILES, GPU_TILES, even_step, slices
from ..matmul import mm_into, product_dtype
from ..memory_pool import pooled_empty


@dataclass(eq=False)
class DivergenceHead:
    """Holds one of both heads and what multiplies with it. Nothing here has a gradient of its own.

    weight: (V, H) any float dtype; bias: (V,) or None; product: dtype of the products' factors; logits: dtype of the
    products.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform
    product: torch.dtype
    logits: torch.dtype
    _cast: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        vocab_size: int,
    ) -> DivergenceHead:
        """Returns the head of a weight (at least V, H) without the columns from vocab_size on; hidden: (N, H)."""
        product = product_dtype(hidden.dtype, hidden.device)
        logits = torch.promote_types(product, torch.float32) if device_facts(hidden.device).is_cuda else product
        return cls(weight[:vocab_size], None if bias is None else bias[:vocab_size], transform, product, logits)

    @property
    def vocab_size(self) -> int:
        """Returns V."""
        return self.weight.shape[0]

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields slices of the columns with the weight's tiles (C, H) in the product's dtype, each until the next."""
        num_columns, hidden_size = self.weight.shape
        if self.weight.dtype == self.product:
            yield slice(0, num_columns), self.weight
            return
        policy = CPU_TILES if device_facts(self.weight.device).kind == "cpu" else GPU_TILES
        most = max(1, policy.weight_bytes // max(1, hidden_size * self.product.itemsize))
        width = even_step(num_columns, most)
        if self._cast is None:
            self._cast = pooled_empty((width, hidden_size), self.product, self.weight.device)
        for columns in slices(0, num_columns, width):
            yield columns, self._cast[: columns.stop - columns.start].copy_(self.weight[columns])

    def multiply(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Computes raw products (R, V) of hidden (R, H) into `out`."""
        hidden = hidden.to(self.product)
        for columns, tile in self.tiles():
            mm_into(out[:, columns], hidden, tile.t())
        return out
