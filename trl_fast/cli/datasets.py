"""Loads datasets by hub name, folder or file, and mixtures of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict, concatenate_datasets, load_dataset

from trl_fast.data import AnyDataset

from .arguments import DatasetMixtureConfig, ScriptArguments

logger = logging.getLogger(__name__)

# File endings and the builder of `datasets` that reads them.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _data_files(path: Path, argument: str) -> tuple[str, str | dict[str, str]]:
    """Returns the builder and the files of a local file, or of a folder with one file a split (train.jsonl, ...)."""
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"{argument}={str(path)!r}: expected a file ending in {', '.join(BUILDERS)}")
        return BUILDERS[path.suffix], str(path)
    files = [file for file in sorted(path.iterdir()) if file.suffix in BUILDERS]
    endings = {BUILDERS[file.suffix] for file in files}
    if len(endings) > 1:
        raise ValueError(f"{argument}={str(path)!r}: the folder mixes file formats {sorted(endings)}; keep one")
    return endings.pop(), {file.stem: str(file) for file in files}


def _is_split_folder(path: Path) -> bool:
    return path.is_dir() and any(file.suffix in BUILDERS for file in path.iterdir())


def _load(path: str, argument: str, **options: Any) -> AnyDataset:
    """Calls `load_dataset` with a hub name, a local file or a folder; `argument` is its name in messages."""
    place = Path(path)
    # A path with a configuration or files of its own is understood by load_dataset alone.
    described = any(options.get(key) is not None for key in ("name", "data_dir", "data_files"))
    try:
        if not described and (place.is_file() or _is_split_folder(place)):
            builder, files = _data_files(place, argument)
            return load_dataset(builder, **{**options, "data_files": files})
        if place.suffix in BUILDERS:
            raise ValueError(f"{argument}={path!r}: there is no such file")
        return load_dataset(path, **options)
    except ValueError as error:
        if "split" in str(error).lower() and f"{argument}=" not in str(error):
            raise ValueError(
                f"{argument}={path!r} has no split {options['split']!r} ({error}); a part of a split is written as "
                "train[:90%]"
            ) from error
        raise


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
        parts.append(part if config.columns is None else part.select_columns(config.columns))
    mixture = concatenate_datasets(_take_fractions(parts, mixture_config))
    if mixture_config.streaming:
        return IterableDatasetDict({"train": mixture})
    if mixture_config.test_split_size is None:
        return DatasetDict({"train": mixture})
    return mixture.train_test_split(test_size=mixture_config.test_split_size)


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


def load_train_and_test(
    arguments: ScriptArguments, mixture: DatasetMixtureConfig, with_test: bool
) -> tuple[AnyDataset, AnyDataset | None]:
    """Loads the dataset to train on and, if asked for, the one to evaluate on; a mixture wins over dataset_name.

    Raises:
        ValueError: neither names a dataset, or a split is missing.
    """
    splits = [arguments.dataset_train_split, arguments.dataset_test_split][: 2 if with_test else 1]
    if not mixture.datasets:
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
