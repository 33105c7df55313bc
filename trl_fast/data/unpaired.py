"""From preference pairs to single completions, each good or bad."""

from __future__ import annotations

from typing import Any

from datasets import IterableDataset, IterableDatasetDict

from .dataset_types import DatasetOrDict


def unpair_preference_dataset(dataset: DatasetOrDict, **map_kwargs: Any) -> DatasetOrDict:
    """Rows with `completion` and a bool `label` out of rows with `chosen` (True) and `rejected` (False).

    Other columns, `prompt` among them, are repeated for both. Within each batch that `map` takes, all chosen
    completions come before the rejected ones. `map_kwargs` are those of `Dataset.map`.
    """
    return dataset.map(_unpair, batched=True, remove_columns=_column_names(dataset), **map_kwargs)


def maybe_unpair_preference_dataset(
    dataset: DatasetOrDict, num_proc: int | None = None, desc: str | None = None
) -> DatasetOrDict:
    """`unpair_preference_dataset` for datasets with `chosen` and `rejected`; others as they are.

    `num_proc` and `desc` are those of `Dataset.map`; streams take neither.
    """
    if not {"chosen", "rejected"} <= set(_column_names(dataset)):
        return dataset
    streamed = isinstance(dataset, (IterableDataset, IterableDatasetDict))
    return unpair_preference_dataset(dataset, **({} if streamed else {"num_proc": num_proc, "desc": desc}))


def _column_names(dataset: DatasetOrDict) -> list[str]:
    first = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
    return first.column_names or list(next(iter(first)))


def _unpair(batch: dict[str, list]) -> dict[str, list]:
    count = len(batch["chosen"])
    others = {name: values * 2 for name, values in batch.items() if name not in ("chosen", "rejected")}
    return {"completion": batch["chosen"] + batch["rejected"], "label": [True] * count + [False] * count, **others}
