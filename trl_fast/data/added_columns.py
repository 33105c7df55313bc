"""Adds columns to datasets without copying those that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from .dataset_types import AnyDataset, map_options


def add_columns(
    dataset: AnyDataset,
    function: Callable[..., dict[str, Any]],
    *,
    num_proc: int | None,
    desc: str,
    features: Features | None = None,
    **options: Any,
) -> AnyDataset:
    """Returns the dataset with the columns that a function makes of each row; those of the same name are replaced.

    `Dataset.map` would write all columns to its cache again, images too; here only the new ones are written. A dataset
    whose rows were shuffled or selected is copied once, as `map` does.

    Args:
        function: gets a row and its number, or what `options` say.
        features: those of the new columns; None: they are told by the first rows.
        options: further arguments of `map`.
    """
    options = {"with_indices": True, **map_options(dataset, num_proc, desc), **options}
    if not isinstance(dataset, Dataset):
        return dataset.map(function, **options)
    made = dataset.map(function, remove_columns=dataset.column_names, features=features, **options)
    replaced = [column for column in dataset.column_names if column in made.column_names]
    return concatenate_datasets([dataset.remove_columns(replaced), made], axis=1)
