"""Tells whether a checkpoint is whole: its files are there, readable, and those that were written together."""

from __future__ import annotations

import json
import os
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

# The record that is written last: what run a checkpoint is of, and which files belong to it.
RECORD_FILE = "trl_fast_checkpoint.json"
# Files that a resumed run reads; people may edit the others.
_STATE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".distcp")
_SINGLE_WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
_WEIGHT_INDEXES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
# Folders of sharded weights and optimizers, which FSDP and DeepSpeed read and check themselves.
_SHARDED_FOLDERS = ("pytorch_model_fsdp*", "global_step*")
# Of a file, so many pieces of so many bytes are looked at.
_PIECES, _PIECE_BYTES = 8, 16384


def state_files(folder: Path) -> dict[str, list]:
    """Returns the files that a resumed run reads, by their path in the folder: size and digest of each."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _STATE_SUFFIXES and path.is_file())
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, sampled_digest(path)]
        for path in paths
        if path.name != TRAINING_ARGS_NAME
    }


def sampled_digest(path: Path) -> str:
    """Hashes pieces of a file that are spread over all of it: cheap also where it has gigabytes."""
    size, digest = path.stat().st_size, blake2b(digest_size=16)
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(0, size - _PIECE_BYTES) * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns a checkpoint's record; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def find_fault(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint in a few words; None if it is whole."""
    try:
        return _state_fault(folder) or _content_fault(folder)
    except OSError as error:
        return f"{error.filename or folder} cannot be read ({error.strerror or error})"


def _state_fault(folder: Path) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return f"{TRAINER_STATE_NAME} is missing: writing it was cut off, or it is no checkpoint"
    try:
        state = json.loads(path.read_text())
    except ValueError:
        what = "is cut off or no JSON" if path.stat().st_size else "is empty"
        return f"{TRAINER_STATE_NAME} {what}"
    step = state.get("global_step") if isinstance(state, dict) else None
    if not isinstance(step, int):
        return f"{TRAINER_STATE_NAME} has no global_step"
    number = folder.name.rpartition("-")[2]
    if number.isdigit() and int(number) != step:
        return f"{TRAINER_STATE_NAME} is of step {step}"
    return None


def _content_fault(folder: Path) -> str | None:
    if not (folder / RECORD_FILE).exists():
        return _foreign_fault(folder)
    record = read_record(folder)
    files = record and record.get("files")
    if not isinstance(files, dict):
        return f"{RECORD_FILE} is empty or cut off"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes where {size:,} were written"
        if sampled_digest(path) != digest:
            return f"{name} is not the file that was written with the others"
    return None


def _foreign_fault(folder: Path) -> str | None:
    """Looks at a checkpoint without a record, which somebody else has written."""
    if any(any(folder.glob(pattern)) for pattern in _SHARDED_FOLDERS):
        return None
    weights = [folder / name for name in _SINGLE_WEIGHTS if (folder / name).is_file()]
    for index in (folder / name for name in _WEIGHT_INDEXES if (folder / name).is_file()):
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is empty or cut off"
        weights += [folder / name for name in names]
    weights += [path for name in _SINGLE_WEIGHTS for path in folder.glob(f"*/{name}") if "adapter" in name]
    if not weights:
        return "it has no weights"
    for path in [*weights, folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME]:
        fault = file_fault(path)
        if fault is not None:
            return f"{path.relative_to(folder)} {fault}"
    return None


def file_fault(path: Path) -> str | None:
    """Returns what is wrong with a file of tensors, by its length and its ends; None if nothing is."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if not size:
        return "is empty"
    if path.suffix == ".safetensors":
        return None if size == _safetensors_length(path) else "is cut off or no safetensors file"
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    # torch.save writes an archive, whose table of contents comes last; its older files are taken as they are.
    return "is cut off" if is_archive and not zipfile.is_zipfile(path) else None


def _safetensors_length(path: Path) -> int | None:
    """Returns the length that a file's own header asks for; None if there is no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None
    return 8 + length + max(ends, default=0)
