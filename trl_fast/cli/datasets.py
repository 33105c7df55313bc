"""Loads datasets by hub name, folder or file, and mixtures of them."""

from __future__ import annotations

import contextlib
import glob
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
)

from trl_fast.data import AnyDataset
from trl_fast.input_errors import error_line
from trl_fast.settings.choices import did_you_mean

from .arguments import DatasetMixtureConfig, ScriptArguments
from .data_files import ENDINGS, builder_of, find_fault, split_name, without_error_logs
from .image_paths import with_paths_beside

logger = logging.getLogger(__name__)

# The files in which `Dataset.save_to_disk` describes what it has written.
_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


def _local_files(path: Path, argument: str) -> dict[str, Path]:
    """Returns the data file, or the files of a folder with one file a split (train.jsonl, ...), by split.

    Raises:
        ValueError: the file's name has an unknown ending, or the folder mixes formats or was saved to disk.
    """
    if path.is_file():
        if builder_of(path) is None:
            raise ValueError(f"{argument}={str(path)!r}: expected a file ending in {ENDINGS}")
        return {"train": path}
    if any((path / name).is_file() for name in _SAVED_TO_DISK):
        raise ValueError(
            f"{argument}={str(path)!r} was written by save_to_disk; write it with dataset.to_parquet('x.parquet')"
        )
    files = {split_name(file): file for file in sorted(path.iterdir()) if builder_of(file) and file.is_file()}
    formats = {str(builder_of(file)) for file in files.values()}
    if len(formats) > 1:
        raise ValueError(f"{argument}={str(path)!r}: the folder mixes file formats {sorted(formats)}; keep one")
    return files


def _load(path: str, argument: str, **options: Any) -> AnyDataset:
    """Calls `load_dataset` with a hub name, a local file or a folder; `argument` is its name in messages.

    Raises:
        ValueError: the data cannot be read; the message names the file and the line where one is broken.
    """
    place, split = Path(path), options["split"]
    # A path with a configuration or files of its own is understood by load_dataset alone.
    described = any(options.get(key) is not None for key in ("name", "data_dir", "data_files"))
    files: dict[str, Path] = {}
    if not path:
        raise ValueError(f"{argument} is empty; give a hub name, a folder or a file")
    if not described and place.exists():
        files = _local_files(place, argument)
    elif builder_of(place) is not None and not place.exists():
        raise ValueError(f"{argument}={path!r}: there is no such file")
    builder, data_files = path, options.pop("data_files", None)
    if files:
        (builder,) = {str(builder_of(file)) for file in files.values()}
        # Brackets and stars of a name are no pattern: the file is there.
        data_files = {name: glob.escape(str(file)) for name, file in files.items()}
    try:
        with without_error_logs():
            dataset = load_dataset(builder, data_files=data_files, **options)
            if isinstance(dataset, IterableDataset):
                # A stream is opened only when its first row is read.
                next(iter(dataset), None)
    except Exception as error:
        fault = find_fault(list(files.values()))
        if fault is not None:
            raise ValueError(f"{argument}: {fault}") from error
        raise ValueError(f"{argument}={path!r}{_reason(error, split)}") from error
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(f"{argument}={path!r}: split={split!r} names no split")
    return with_paths_beside(dataset, place if place.is_dir() else place.parent) if files else dataset


def _reason(error: Exception, split: str | None) -> str:
    """Returns why `load_dataset` failed, where its files are not to blame, after the name of the dataset."""
    text = error_line(error)
    if "corresponds to no data" in text or isinstance(error, StopIteration):
        return f", split {split!r} has no rows"
    if "split" in text.lower() or "slice" in text.lower() or "instruction" in text.lower():
        return f" has no split {split!r} ({text}); a part of a split is written as train[:90%]"
    return f": {text}"


def load_split(arguments: ScriptArguments, split: str) -> AnyDataset:
    """Loads one split of the dataset that the arguments name; slices such as "train[:90%]" work.

    Raises:
        ValueError: there is no dataset_name, no such file, or no such split.
    """
    if arguments.dataset_name is None:
        raise ValueError("dataset_name is missing; give a hub name, a folder or a file, or `datasets` in a YAML file")
    try:
        return _load(
            arguments.dataset_name,
            "dataset_name",
            name=arguments.dataset_config,
            split=split,
            streaming=arguments.dataset_streaming,
        )
    except ValueError as error:
        if "has no split" in str(error):
            raise ValueError(f"{error}; set dataset_train_split or dataset_test_split") from error
        raise


def get_dataset(mixture_config: DatasetMixtureConfig) -> DatasetDict | IterableDatasetDict:
    """Loads the datasets of a mixture, joined into the split "train"; with `test_split_size` also into "test".

    With fractions w (scaled to sum to 1), each dataset gives its first round(w N) rows, where N is the largest size at
    which none gives more rows than it has.

    Raises:
        ValueError: there are no datasets, or the settings contradict each other.
    """
    if not mixture_config.datasets:
        raise ValueError("datasets is empty; name at least one dataset of the mixture")
    if mixture_config.streaming and mixture_config.test_split_size is not None:
        raise ValueError("test_split_size needs datasets of known length; set streaming: false")
    parts = []
    for index, config in enumerate(mixture_config.datasets):
        part = _load(
            config.path,
            f"datasets.{index}.path",
            name=config.name,
            data_dir=config.data_dir,
            data_files=config.data_files,
            split=config.split,
            streaming=mixture_config.streaming,
        )
        parts.append(part if config.columns is None else _select(part, config.columns, index))
    parts = _take_fractions(parts, mixture_config)
    try:
        mixture = concatenate_datasets(parts)
    except ValueError as error:
        raise ValueError(f"datasets: they do not fit together: {error_line(error)}; use `columns`") from error
    if mixture_config.streaming:
        return IterableDatasetDict({"train": mixture})
    if mixture_config.test_split_size is None:
        return DatasetDict({"train": mixture})
    size = mixture_config.test_split_size
    if size >= len(mixture):
        raise ValueError(f"test_split_size={size}: the mixture has {len(mixture)} rows; leave some to train on")
    return mixture.train_test_split(test_size=size if size < 1 else int(size))


def _select(dataset: AnyDataset, columns: list[str], index: int) -> AnyDataset:
    for column in columns:
        if column not in (dataset.column_names or columns):
            hint = did_you_mean(column, dataset.column_names)
            raise ValueError(f"datasets.{index}.columns names {column!r}; there are {dataset.column_names}{hint}")
    return dataset.select_columns(columns)


def _take_fractions(parts: list[AnyDataset], mixture_config: DatasetMixtureConfig) -> list[AnyDataset]:
    given = [config.fraction for config in mixture_config.datasets]
    fractions = [fraction for fraction in given if fraction is not None]
    if not fractions:
        return parts
    if None in given:
        raise ValueError(f"datasets.{given.index(None)}: fraction must be set for all datasets or for none")
    if mixture_config.streaming:
        raise ValueError("datasets: fraction needs datasets of known length; set streaming: false")
    if min(fractions) < 0 or sum(fractions) == 0:
        raise ValueError(f"datasets: fractions must be at least 0 and not all 0, got {fractions}")
    weights = [fraction / sum(fractions) for fraction in fractions]
    size = min(len(part) / weight for part, weight in zip(parts, weights, strict=True) if weight > 0)
    return [part.select(range(round(weight * size))) for part, weight in zip(parts, weights, strict=True)]


class BadDataError(ValueError):
    """Is raised where a row or column of the data cannot be used."""


@contextlib.contextmanager
def named_data(arguments: ScriptArguments, mixture: DatasetMixtureConfig) -> Iterator[None]:
    """Adds the file, folder or hub name that the data came from to an error about a row or column.

    Raises:
        BadDataError: such an error was raised inside; with that name.
    """
    paths = [config.path for config in mixture.datasets] or [arguments.dataset_name or ""]
    try:
        yield
    except UnicodeDecodeError as error:
        # Arrow decodes texts only when they are read.
        files = [file for path in paths if Path(path).exists() for file in _local_files(Path(path), "").values()]
        raise BadDataError(find_fault(files) or f"{', '.join(paths)}: {error_line(error)}") from error
    except (ValueError, TypeError) as error:
        if not re.match(r"The .*\bdataset\b", str(error)):
            raise
        raise BadDataError(f"{', '.join(paths)}: {error}") from error


def load_train_and_test(
    arguments: ScriptArguments, mixture: DatasetMixtureConfig, with_test: bool
) -> tuple[AnyDataset, AnyDataset | None]:
    """Loads the dataset to train on and, if asked for, the one to evaluate on; a mixture wins over dataset_name.

    Raises:
        ValueError: neither names a dataset, or a split is missing.
    """
    splits = [arguments.dataset_train_split, arguments.dataset_test_split][: 2 if with_test else 1]
    if not mixture.datasets:
        if mixture.test_split_size is not None:
            raise ValueError(
                f"test_split_size={mixture.test_split_size} is for a mixture, and there is none: name the dataset "
                "under `datasets:` in a --config file, or leave test_split_size out"
            )
        loaded = [load_split(arguments, split) for split in splits]
    else:
        if arguments.dataset_name is not None:
            logger.warning("Both datasets and dataset_name are given: the mixture of `datasets` is used.")
        parts = get_dataset(mixture)
        for split in splits:
            if split not in parts:
                raise ValueError(f"the mixture has no split {split!r}; set test_split_size to cut one off")
        loaded = [parts[split] for split in splits]
    return loaded[0], loaded[1] if with_test else None
