"""Names the types of dataset that functions take, and the options that each type's `map` takes."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

# One split. An IterableDataset is a stream: its rows are known only as they are read.
AnyDataset: TypeAlias = Dataset | IterableDataset
# One split, or several by name.
DatasetOrDict = TypeVar("DatasetOrDict", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)


def map_options(dataset: AnyDataset, num_proc: int | None, desc: str) -> dict[str, Any]:
    """Returns the keywords of `map` and `filter` that only a Dataset takes: a stream takes none of them."""
    return {"num_proc": num_proc, "desc": desc} if isinstance(dataset, Dataset) else {}


def get_dataset_column_names(dataset: AnyDataset) -> list[str]:
    """Returns the names of a dataset's columns; a stream that does not know them reads its first row."""
    return dataset.column_names or list(next(iter(dataset)))
