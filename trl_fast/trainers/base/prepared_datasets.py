"""Checks datasets: their type, and once they are prepared their token ids, against a model's vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_fast.data import AnyDataset, check_head_vocabulary, check_token_ids, longest_sequence
from trl_fast.modeling.loading import base_model
from trl_fast.modeling.position_limits import check_positions
from trl_fast.parallel.agreement import first_of_machine_first
from trl_fast.parallel.partitions import whole_shape

from .config import BaseConfig

logger = logging.getLogger(__name__)

# Formats of `datasets` in which a row is a table of one row.
_TABLES = ("arrow", "pandas", "polars")


def check_dataset_type(dataset: object, name: str) -> None:
    """Raises ValueError if `dataset` is None, TypeError if it is no Dataset or IterableDataset of `datasets`."""
    if dataset is None:
        raise ValueError(f"{name} is required")
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"{name}: expected a datasets.Dataset or IterableDataset, got {type(dataset).__name__}")


def shows_tokens(dataset: AnyDataset | None, columns: tuple[str, ...]) -> bool:
    """Says whether a dataset's token ids can be looked through: neither a stream nor made as they are read."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return False
    return set(columns) <= set(dataset.column_names)


def check_lengths(
    dataset: AnyDataset, name: str, columns: tuple[str, ...], model: PreTrainedModel, max_length: int | None
) -> None:
    """Checks that a model has positions for a prepared dataset's longest sequence, as far as that can be told.

    Raises:
        ValueError: as in `modeling.position_limits.check_positions`.
    """
    longest = longest_sequence(dataset, columns) if shows_tokens(dataset, columns) else None
    if longest is not None and max_length is not None and "prompt_ids" in columns:
        # Those rows are cut as they are batched.
        longest = min(longest, max_length)
    check_positions(model, longest, max_length, name)


def named_parts(
    train_dataset: AnyDataset, eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None
) -> dict[str, AnyDataset]:
    """Returns all datasets by the names that messages give them."""
    if isinstance(eval_dataset, Mapping):
        return {"train": train_dataset, **{f"eval {name}": part for name, part in eval_dataset.items()}}
    return {"train": train_dataset} if eval_dataset is None else {"train": train_dataset, "eval": eval_dataset}


def change_parts(
    change: Callable[[AnyDataset, str], AnyDataset],
    train_dataset: AnyDataset,
    eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None,
) -> tuple[AnyDataset, AnyDataset | dict[str, AnyDataset] | None]:
    """Returns both datasets, or all of a dict of them, as `change` gives them from a dataset and its name.

    Raises:
        ValueError, TypeError: as in `check_dataset_type`.
    """
    changed = {}
    for name, part in named_parts(train_dataset, eval_dataset).items():
        check_dataset_type(part, _argument_of(name))
        changed[name] = change(part, name)
    train_dataset = changed.pop("train")
    if isinstance(eval_dataset, Mapping):
        return train_dataset, dict(zip(eval_dataset, changed.values(), strict=True))
    return train_dataset, changed.get("eval")


def _argument_of(name: str) -> str:
    """Returns the argument in which a dataset of `named_parts` was given."""
    kind, _, key = name.partition(" ")
    return f"{kind}_dataset[{key!r}]" if key else f"{kind}_dataset"


def with_dicts_as_rows(dataset: AnyDataset, _name: str) -> AnyDataset:
    """Returns a dataset without a format in which a row is a table: preparing and collating read dicts."""
    is_table = isinstance(dataset, Dataset) and dataset.format["type"] in _TABLES
    return dataset.with_format(None) if is_table else dataset


class DatasetPreparer(Protocol):
    """Prepares and checks datasets; a trainer is one."""

    token_columns: tuple[str, ...]

    def prepare_dataset(
        self, dataset: AnyDataset, processing_class: PreTrainedTokenizerBase, args: BaseConfig, name: str
    ) -> AnyDataset:
        """Returns the rows that the collator reads."""

    def check_positions(self, model: PreTrainedModel, dataset: AnyDataset, args: BaseConfig, name: str) -> None:
        """Checks that a model has positions for them."""


def prepared_parts(
    preparer: DatasetPreparer,
    train_dataset: AnyDataset,
    eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None,
    processing_class: PreTrainedTokenizerBase,
    args: BaseConfig,
    model: PreTrainedModel | PeftModel,
) -> tuple[AnyDataset, AnyDataset | dict[str, AnyDataset] | None]:
    """Returns both datasets prepared, after their token ids were held against the model's vocabulary.

    Raises:
        ValueError, TypeError: as in `change_parts`, `check_vocabulary` and the preparer.
    """
    with first_of_machine_first(args.local_process_index):
        prepare = lambda part, name: preparer.prepare_dataset(part, processing_class, args, name)  # noqa: E731
        prepared = change_parts(prepare, train_dataset, eval_dataset)
    parts = named_parts(*prepared)
    check_vocabulary(parts, preparer.token_columns, model, processing_class)
    for name, part in parts.items():
        preparer.check_positions(base_model(model), part, args, name)
    return prepared


def check_vocabulary(
    parts: Mapping[str, AnyDataset],
    columns: tuple[str, ...],
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
) -> None:
    """Checks that a model knows the token ids in the columns of prepared datasets.

    Raises:
        ValueError: it does not; names dataset and row.
    """
    vocab_size = _vocabulary_of(model)
    known = {name: part for name, part in parts.items() if shows_tokens(part, columns)}
    largest = [check_token_ids(part, vocab_size, name, columns) for name, part in known.items()]
    check_head_vocabulary(
        processing_class, vocab_size, max(largest, default=None) if len(known) == len(parts) else None
    )


def check_reference_vocabulary(
    parts: Mapping[str, AnyDataset],
    columns: tuple[str, ...],
    model: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
) -> None:
    """Checks that a reference whose vocabulary is smaller than the model's knows the token ids of prepared datasets.

    Raises:
        ValueError: it does not; names dataset and row.
    """
    if reference is None or _vocabulary_of(reference) >= _vocabulary_of(model):
        return
    for name, part in parts.items():
        if shows_tokens(part, columns):
            try:
                check_token_ids(part, _vocabulary_of(reference), name, columns)
            except ValueError as error:
                raise ValueError(f"ref_model has another vocabulary than the model. {error}") from error


def _vocabulary_of(model: PreTrainedModel | PeftModel) -> int:
    inner = base_model(model)
    head: Any = inner.get_output_embeddings() or inner.get_input_embeddings()
    return whole_shape(head.weight)[0]


def without_columns(dataset: AnyDataset, name: str, columns: tuple[str, ...], reason: str) -> AnyDataset:
    """Returns a dataset without those of `columns` that it has, which a line names with the reason."""
    found = [column for column in columns if column in (dataset.column_names or ())]
    if not found:
        return dataset
    logger.warning("The %s dataset's columns %s are not read: %s", name, found, reason)
    return dataset.remove_columns(found)
