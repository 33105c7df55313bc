"""Puts the images of batches into the memory that is planned: there they are as long as a trainer has the batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from trl_fast.data import TokenBatch


def on_device(inputs: Any) -> Any:
    """Copies a batch, or a dataclass that has one, with its pixels in the memory that is planned."""
    if isinstance(inputs, TokenBatch):
        extras = {
            name: on_device(each) if isinstance(each, TokenBatch) else each for name, each in inputs.extras.items()
        }
        return replace(inputs, images=inputs.images and pixels_on_device(inputs.images), extras=extras)
    return replace(inputs, **({"batch": on_device(inputs.batch)} if hasattr(inputs, "batch") else {}))


def pixels_on_device(images: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies the same of what a model reads of images: pixels of any shape, by keyword of its forward."""
    return {name: each.clone() if each.is_floating_point() else each for name, each in images.items()}
