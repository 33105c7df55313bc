"""Finds the images that the rows of a data file name by paths: seen from here, or from the file's folder."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from trl_fast.data import AnyDataset
from trl_fast.data.images.columns import IMAGE_COLUMNS, has_images
from trl_fast.data.images.messages import IMAGE_KEYS


def with_paths_beside(dataset: AnyDataset, folder: Path) -> AnyDataset:
    """Returns a dataset whose relative paths of images begin in `folder`, where there is such a file and none here.

    Datasets without images come back as they are.
    """
    if not has_images(dataset):
        return dataset
    return dataset.map(functools.partial(_resolved_row, folder=folder))


def _resolved_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        column: _resolved(value, folder) if column in IMAGE_COLUMNS else _resolved_parts(value, folder)
        for column, value in row.items()
    }


def _resolved_parts(value: Any, folder: Path) -> Any:
    """Returns messages with the paths in their parts resolved."""
    if isinstance(value, list):
        return [_resolved_parts(each, folder) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "image":
        return {key: _resolved(each, folder) if key in IMAGE_KEYS else each for key, each in value.items()}
    return {key: _resolved_parts(each, folder) for key, each in value.items()}


def _resolved(value: Any, folder: Path) -> Any:
    """Returns a path, or the paths in a list or in a dict of bytes and path, from the folder where it is there."""
    if isinstance(value, list):
        return [_resolved(each, folder) for each in value]
    if isinstance(value, dict) and "path" in value:
        return {**value, "path": _resolved(value["path"], folder)}
    if not isinstance(value, str) or os.path.isfile(value):
        return value
    beside = os.path.join(folder, value)
    return beside if os.path.isfile(beside) else value
