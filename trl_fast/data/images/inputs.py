"""Holds what a processor makes of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class ImageInput:
    """Holds what a processor makes of one image.

    - `tensors`: keywords of the model's forward, such as `pixel_values` and `image_grid_thw`, with the values for this
      image alone.
    - `num_tokens`: how many image tokens stand for it among the token ids.
    """

    tensors: Mapping[str, torch.Tensor]
    num_tokens: int

    def is_same(self, other: ImageInput) -> bool:
        """Returns whether a model reads the same of another image."""
        if self is other:
            return True
        if self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
