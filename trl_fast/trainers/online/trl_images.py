"""Shows the images of samples as TRL's batches do: tensors of all images, joined, and how many a row has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from trl_fast.data.images.inputs import ImageInput
from trl_fast.data.images.joining import join_images
from trl_fast.data.images.layout import ImageLayout

# TRL's keys of what a model's forward takes of images, and of token types, which have a row a completion.
_BY_IMAGE = ("image_grid_thw", "image_sizes", "image_position_ids")
PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes", *_BY_IMAGE)
TYPES = ("token_type_ids", "mm_token_type_ids")
COUNTS = ("num_images", "num_tiles")
IMAGE_KEYS = (*PIXELS, *TYPES, *COUNTS)


def image_entries(
    images: Sequence[Sequence[ImageInput]], layout: ImageLayout, input_ids: torch.Tensor, width: int
) -> dict[str, Any]:
    """Returns TRL's entries for the images of B rows; none where there are none.

    Args:
        images: of each row, in the order of their tokens.
        input_ids: (B, T) int64, prompts padded on the left, then completions.
        width: columns of the prompts.
    """
    every = [image for own in images for image in own]
    if not every:
        return {}
    marked = layout.marked_tokens(input_ids, [width if own else 0 for own in images])
    found: dict[str, Any] = join_images(every) | layout.types_of(marked)
    found["num_images"] = [len(own) for own in images]
    if "image_grid_thw" not in found and any(len(image.tensors["pixel_values"]) > 1 for image in every):
        found["num_tiles"] = [sum(len(image.tensors["pixel_values"]) for image in own) for own in images]
    return found


def split_by_row(entries: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """Returns, of TRL's entries, those of all images of a batch, a tensor a row.

    Raises:
        ValueError: a tensor has not as many rows as the images of the batch.
    """
    counts: list[int] | None = entries.get("num_images")
    if counts is None:
        return {}
    tiles = entries.get("num_tiles") or counts
    if entries.get("image_grid_thw") is not None:
        areas = entries["image_grid_thw"].prod(-1).tolist()
        tiles = [sum(areas[start:end]) for start, end in pairwise(accumulate(counts, initial=0))]
    # Some families have a row a completion, with as many images as one has at most.
    sizes = {name: (counts,) if name in _BY_IMAGE else (tiles, counts, [1] * len(counts)) for name in PIXELS}
    found = {}
    for name in PIXELS:
        tensor = entries.get(name)
        if tensor is None:
            continue
        fitting = next((known for known in sizes[name] if sum(known) == len(tensor)), None)
        if fitting is None:
            raise ValueError(
                f"the batch's {name} have {len(tensor)} rows; expected {sum(sizes[name][0])}, by num_images"
            )
        found[name] = list(tensor.split(fitting))
    return found
