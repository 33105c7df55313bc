"""Checks that limits on lengths cut no image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from trl_fast.data.dataset_types import AnyDataset
from trl_fast.data.row_places import place
from trl_fast.data.token_checks import token_tables


def check_images_are_kept(
    dataset: AnyDataset,
    image_token_id: int,
    max_length: int | None,
    truncation_mode: str,
    max_prompt_length: int | None,
    name: str,
) -> AnyDataset:
    """Returns a dataset with `prompt_ids`, if no limit cuts its images; a stream is checked as it is read.

    max_length: what comes after the first so many tokens is cut; max_prompt_length: so is what comes before the last
    so many tokens of the prompt. None: no limit.

    Raises:
        ValueError: a limit would cut an image; the message names the row. Or `max_length` keeps the end, where images
            are not.
    """
    if max_length is not None and truncation_mode == "keep_end":
        raise ValueError(
            "truncation_mode='keep_end' is not supported with images: they stand in the prompt, whose beginning it "
            "cuts. Use truncation_mode='keep_start', or set max_length=None."
        )
    if max_length is None and max_prompt_length is None:
        return dataset
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    if not isinstance(dataset, Dataset):
        options = {"image_token_id": image_token_id, "name": name, **limits}
        return dataset.map(_check_row, with_indices=True, fn_kwargs=options)
    for start, table in token_tables(dataset, ("prompt_ids",)):
        column = table["prompt_ids"].combine_chunks()
        offsets = column.offsets.to_numpy()
        images = np.flatnonzero(column.values.to_numpy(zero_copy_only=False) == image_token_id)
        rows = np.searchsorted(offsets, images, side="right") - 1
        lengths = np.diff(offsets)
        for row in np.unique(rows).tolist():
            tokens = images[rows == row] - offsets[row]
            _check_tokens(tokens, int(lengths[row]), start + row, name, **limits)
    return dataset


def check_row_images(
    prompt_ids: Sequence[int],
    image_token_id: int,
    row: int,
    name: str,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
) -> None:
    """Checks a row as `check_images_are_kept` does."""
    tokens = np.flatnonzero(np.asarray(prompt_ids) == image_token_id)
    _check_tokens(tokens, len(prompt_ids), row, name, max_length, max_prompt_length)


def _check_tokens(
    tokens: np.ndarray, length: int, row: int, name: str, max_length: int | None, max_prompt_length: int | None
) -> None:
    """Checks that the limits cut none of the image tokens at the places (n,) of a prompt of that length."""
    behind = tokens >= max_length if max_length is not None else tokens < 0
    before = tokens < length - max_prompt_length if max_prompt_length is not None else tokens < 0
    for limit, value, cut in (
        ("max_length", max_length, behind),
        ("max_prompt_length", max_prompt_length, before),
    ):
        if cut.any():
            raise ValueError(
                f"{place(name, row)}: {limit}={value} would cut {cut.sum()} of the {len(tokens)} image tokens of a "
                f"prompt of {length} tokens; raise it, set it to None, or make the images smaller."
            )


# It is given to `map`, so it stands at module level.


def _check_row(
    example: dict[str, Any], row: int, image_token_id: int, name: str, **limits: int | None
) -> dict[str, Any]:
    check_row_images(example["prompt_ids"], image_token_id, row, name, **limits)
    return {}
