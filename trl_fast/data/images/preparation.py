"""Readies datasets with images for the functions that make token ids of their rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_fast.data.added_columns import add_columns
from trl_fast.data.dataset_types import AnyDataset, map_options

from .columns import gather_images, has_images, with_encoded_images
from .reader import ImageReader


def with_images(
    dataset: AnyDataset, reader: ImageReader | None, *, num_proc: int | None, name: str
) -> tuple[AnyDataset, ImageReader | None]:
    """Returns a dataset ready for `row_images`, and the reader if its rows have images.

    Images stay as they are stored; those in messages come into a column `images` too.
    """
    dataset = with_encoded_images(dataset)
    if reader is None or not has_images(dataset):
        return dataset, None
    return gather_images(dataset, num_proc=num_proc, name=name), reader


def map_rows(
    dataset: AnyDataset,
    function: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    reader: ImageReader | None,
    num_proc: int | None,
    desc: str,
) -> AnyDataset:
    """Returns the dataset with the columns that a function makes of each row, its number, and the arguments.

    Where there is a reader it is the argument `image_reader`, and the images are not copied.
    """
    if reader is None:
        return dataset.map(function, with_indices=True, fn_kwargs=arguments, **map_options(dataset, num_proc, desc))
    return add_columns(
        dataset, function, num_proc=num_proc, desc=desc, fn_kwargs={**arguments, "image_reader": reader}
    )
