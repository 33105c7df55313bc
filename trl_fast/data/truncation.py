"""Cuts the prompts and completions of tokenized datasets, and drops the rows that have no room for a completion."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from .dataset_types import AnyDataset, map_options


def cut_parts(
    dataset: AnyDataset,
    completions: tuple[str, ...],
    *,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    num_proc: int | None,
    name: str,
) -> AnyDataset:
    """Cuts off the beginnings of longer prompts, and the ends of longer completions in the columns `completions`."""
    if max_prompt_length is not None:
        options = map_options(dataset, num_proc, f"Truncating prompts of {name} dataset")
        dataset = dataset.map(_keep_prompt_end, fn_kwargs={"max_prompt_length": max_prompt_length}, **options)
    if max_completion_length is not None:
        options = map_options(dataset, num_proc, f"Truncating completions of {name} dataset")
        arguments = {"max_completion_length": max_completion_length, "columns": completions}
        dataset = dataset.map(_keep_completion_start, fn_kwargs=arguments, **options)
    return dataset


def drop_without_room(dataset: AnyDataset, max_length: int, num_proc: int | None, name: str) -> AnyDataset:
    """Returns the rows whose prompt leaves room for a completion in `max_length` tokens.

    Raises ValueError if there are none.
    """
    options = map_options(dataset, num_proc, f"Dropping fully truncated rows of {name} dataset")
    kept = dataset.filter(_prompt_leaves_room, fn_kwargs={"max_length": max_length}, **options)
    if isinstance(dataset, Dataset):
        check_not_emptied(kept, max_length, name)
        # Without a choice of rows later columns are added without copying the others.
        return dataset if len(kept) == len(dataset) else kept
    return kept


def check_not_emptied(dataset: Dataset, max_length: int, name: str = "train") -> None:
    """Checks that a row is left after those were dropped whose prompt fills `max_length`.

    Raises ValueError otherwise.
    """
    if len(dataset) == 0:
        raise ValueError(
            f"The {name} dataset is empty: in every row the prompt alone has max_length={max_length} tokens or more, "
            "which leaves no room for a completion. Raise max_length, or set it to None."
        )


# The functions given to `map` and `filter` stand at module level: datasets pickles them for its worker processes and
# hashes them for its cache.


def _keep_prompt_end(example: dict[str, Any], max_prompt_length: int) -> dict[str, list[int]]:
    prompt_ids = example["prompt_ids"]
    return {"prompt_ids": prompt_ids[max(len(prompt_ids) - max_prompt_length, 0) :]}


def _keep_completion_start(
    example: dict[str, Any], max_completion_length: int, columns: tuple[str, ...]
) -> dict[str, list[int]]:
    return {column: example[column][:max_completion_length] for column in columns}


def _prompt_leaves_room(example: dict[str, Any], max_length: int) -> bool:
    return len(example["prompt_ids"]) < max_length
