"""Finds checkpoints that are whole, and lets a folder keep so many of them."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .files import find_fault, read_record

logger = logging.getLogger(__name__)

# What is being written, and what is being removed, has another name than a checkpoint.
WRITING, REMOVING = "tmp-", "tmp-old-"


def checkpoint_name(step: int) -> str:
    """Returns the name of the folder of a step's checkpoint."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Returns the folders that are named as checkpoints, by their steps; whole or not."""
    paths = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in paths if _number(path).isdigit()), key=lambda path: int(_number(path)))


def _number(path: Path) -> str:
    return path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def _written(path: Path) -> float:
    """Returns when a checkpoint was written, in seconds since 1970."""
    record = read_record(path)
    if record is not None and isinstance(record.get("written"), float):
        return record["written"]
    try:
        return (path / TRAINER_STATE_NAME).stat().st_mtime
    except OSError:
        return 0.0


def newest_checkpoint(output_dir: str) -> str:
    """Returns the last checkpoint of the folder's last run that is whole; says in a line each which ones are not.

    Raises:
        ValueError: there is none.
    """
    whole: list[Path] = []
    for path in checkpoint_folders(output_dir):
        fault = find_fault(path)
        if fault is None:
            whole.append(path)
        else:
            logger.warning(f"{path} is left out, since it is not whole: {fault}.")
    if not whole:
        raise ValueError(f"resume_from_checkpoint=True: no complete checkpoint in output_dir={output_dir!r}")
    last_run = _run(max(whole, key=_written))
    found = [path for path in whole if _run(path) == last_run]
    others = [path.name for path in whole if _run(path) != last_run and int(_number(path)) > int(_number(found[-1]))]
    if others:
        logger.warning(f"{output_dir}: {', '.join(others)} are left out, since they are of an earlier run.")
    return str(found[-1])


def _run(path: Path) -> str | None:
    record = read_record(path)
    return None if record is None else record.get("run")


def check_whole(checkpoint: str) -> None:
    """Makes sure that a checkpoint is whole.

    Raises:
        ValueError: it is not; says why.
    """
    fault = find_fault(Path(checkpoint))
    if fault is not None:
        raise ValueError(
            f"resume_from_checkpoint={checkpoint!r} is not a whole checkpoint: {fault}; "
            "give another one, or True for the last one that is whole"
        )


def rotate(output_dir: Path, limit: int | None, keep: Collection[str | None]) -> None:
    """Removes the oldest whole checkpoints of a folder until there are `limit`; those of `keep` stay.

    Those that are not whole count as nothing: they do not take the place of a good one.
    """
    if not limit or limit < 0:
        return
    found = [path for path in checkpoint_folders(output_dir) if find_fault(path) is None]
    kept = {os.path.realpath(path) for path in keep if path is not None}
    surplus = len(found) - max(limit, sum(os.path.realpath(path) in kept for path in found))
    for path in sorted(found, key=_written):
        if surplus > 0 and os.path.realpath(path) not in kept:
            remove(path)
            surplus -= 1


def remove(path: Path) -> None:
    """Removes a checkpoint: first its name, so that no half of it is taken for a whole one."""
    doomed = path.with_name(f"{REMOVING}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        path.rename(doomed)
    except OSError:
        doomed = path
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(output_dir: str) -> None:
    """Takes away what a run that was killed while it wrote or removed a checkpoint has left.

    A checkpoint that was written to its end and had not got its name yet gets it.
    """
    for path in sorted(Path(output_dir).glob(f"{WRITING}*{PREFIX_CHECKPOINT_DIR}-*")):
        if not path.is_dir():
            continue
        name = path.name.removeprefix(WRITING)
        inner, final = path / name, path.with_name(name)
        if read_record(inner) is not None and find_fault(inner) is None and not final.exists():
            inner.rename(final)
            logger.warning(f"{final} was written to its end by a run that was killed then; it counts.")
        elif not path.name.startswith(REMOVING):
            logger.warning(f"{path} is removed: a run was killed while it wrote {name}.")
        shutil.rmtree(path, ignore_errors=True)
