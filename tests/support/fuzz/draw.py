"""Draws the choices and the tensors of one case, and remembers the choices in words."""

from __future__ import annotations

import random
from typing import Any

import torch


class Draw:
    """Draws from `seed/index` alone. `said` holds the choices by their names, in order: what a report shows."""

    def __init__(self, seed: int, index: int) -> None:
        self.line = f"{seed}/{index}"
        self.said: dict[str, Any] = {}
        self._random = random.Random(self.line)
        self._generator = torch.Generator().manual_seed(self._random.getrandbits(60))

    def choose(self, name: str, *values: Any) -> Any:
        """Returns one of the values; one that is given twice is twice as likely."""
        value = self.said[name] = self._random.choice(values)
        return value

    def chance(self, name: str, probability: float) -> bool:
        """Returns whether something happens; it is said only if so."""
        happens = self._random.random() < probability
        if happens:
            self.said[name] = True
        return happens

    def whole(self, low: int, high: int) -> int:
        """Returns a whole number of [low, high], unsaid."""
        return self._random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """Returns a number of [low, high], unsaid."""
        return self._random.uniform(low, high)

    def normal(self, *shape: int) -> torch.Tensor:
        """Returns normal float32 numbers."""
        return torch.randn(shape, generator=self._generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Returns float32 numbers of [0, 1)."""
        return torch.rand(shape, generator=self._generator)

    def indices(self, high: int, *shape: int) -> torch.Tensor:
        """Returns int64 numbers of [0, high)."""
        return torch.randint(0, high, shape, generator=self._generator)

    def split(self, total: int) -> list[int]:
        """Returns sizes of groups, empty ones among them, that sum to `total`."""
        sizes = []
        while sum(sizes) < total:
            sizes.append(self.whole(0, min(5, total - sum(sizes))))
        return sizes

    def laid_out(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the same numbers in memory of another layout; what lies between them is NaN, or out of range."""
        layouts = ["plain", "plain", "shifted", "columns"]
        if tensor.dim() > 1:
            layouts += ["rows", "transposed", "expanded"]
        return in_layout(tensor, self.choose(f"{name}_layout", *layouts))


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns a tensor's numbers in memory of a layout; "expanded" repeats the first row for all."""
    poison = float("nan") if tensor.is_floating_point() else -(1 << 60)
    if layout == "plain":
        return tensor.contiguous()
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if len(tensor) else tensor
    if layout == "shifted":
        room = tensor.new_full((tensor.numel() + 3,), poison)
        return room[3:].view(tensor.shape).copy_(tensor)
    shape = list(tensor.shape)
    stretched = 0 if layout == "rows" else tensor.dim() - 1
    shape[stretched] *= 2
    room = tensor.new_full(shape, poison)
    return (room[::2] if stretched == 0 else room[..., ::2]).copy_(tensor)
