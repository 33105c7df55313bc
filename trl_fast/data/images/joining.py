"""Joins what a model reads of single images to what it reads of all images of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .inputs import ImageInput


class ImageShape(NamedTuple):
    """Holds how many image tokens an image has, and the shape of each of its tensors, by keyword."""

    num_tokens: int
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, image: ImageInput) -> ImageShape:
        """Returns the shape of an image's input."""
        return cls(image.num_tokens, {name: tuple(tensor.shape) for name, tensor in image.tensors.items()})


def join_images(images: Sequence[ImageInput]) -> dict[str, torch.Tensor]:
    """Returns what a model's forward takes of several images, by keyword.

    Tensors are concatenated, padded with zeros at the end of the other dimensions where those differ.
    """
    return {name: _join([image.tensors[name] for image in images]) for name in images[0].tensors}


def split_images(joined: Mapping[str, torch.Tensor], shapes: Sequence[ImageShape]) -> list[ImageInput]:
    """Returns the single images that `join_images` joined; they share its memory.

    joined: tensors (rows of all images, …) by keyword. shapes: of each image, in order.
    """
    parts = {name: tensor.split([shape.shapes[name][0] for shape in shapes]) for name, tensor in joined.items()}
    return [
        ImageInput(
            {name: parts[name][number][tuple(map(slice, sizes))] for name, sizes in shape.shapes.items()},
            shape.num_tokens,
        )
        for number, shape in enumerate(shapes)
    ]


def _join(tensors: list[torch.Tensor]) -> torch.Tensor:
    widths = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_padded(tensor, widths) for tensor in tensors])


def _padded(tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
    missing = [width - size for width, size in zip(widths, tensor.shape[1:], strict=True)]
    return F.pad(tensor, [each for gap in reversed(missing) for each in (0, gap)]) if any(missing) else tensor
