"""Datasets by hub name, folder or file."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from .arguments import ScriptArguments

# File endings and the builder of `datasets` that reads them.
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def _data_files(path: Path) -> tuple[str, str | dict[str, str]]:
    """The builder and files of a local file or of a folder with one file a split (train.jsonl, test.jsonl, ...)."""
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"dataset_name={str(path)!r}: expected a file ending in {', '.join(BUILDERS)}")
        return BUILDERS[path.suffix], str(path)
    files = [file for file in sorted(path.iterdir()) if file.suffix in BUILDERS]
    endings = {BUILDERS[file.suffix] for file in files}
    if len(endings) > 1:
        raise ValueError(f"dataset_name={str(path)!r}: the folder mixes file formats {sorted(endings)}; keep one")
    return endings.pop(), {file.stem: str(file) for file in files}


def _is_split_folder(path: Path) -> bool:
    return path.is_dir() and any(file.suffix in BUILDERS for file in path.iterdir())


def load_split(arguments: ScriptArguments, split: str) -> Dataset | IterableDataset:
    """One split of the dataset that the arguments name; slices such as "train[:90%]" work.

    Raises:
        ValueError: there is no dataset_name, no such file, or no such split.
    """
    name = arguments.dataset_name
    if name is None:
        raise ValueError("dataset_name is missing; give a hub name, a folder or a file")
    path = Path(name)
    options = {"split": split, "streaming": arguments.dataset_streaming}
    try:
        if path.is_file() or _is_split_folder(path):
            builder, files = _data_files(path)
            return load_dataset(builder, data_files=files, **options)
        if path.suffix in BUILDERS:
            raise ValueError(f"dataset_name={name!r}: there is no such file")
        return load_dataset(name, name=arguments.dataset_config, **options)
    except ValueError as error:
        if "split" in str(error).lower() and "dataset_name=" not in str(error):
            raise ValueError(
                f"dataset_name={name!r} has no split {split!r} ({error}); set dataset_train_split or "
                "dataset_test_split, a part of a split being written as train[:90%]"
            ) from error
        raise
