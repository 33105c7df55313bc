"""Finds a run's checkpoints."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def check_output_dir(output_dir: str) -> None:
    """Makes sure, before any work is done, that its result can be written.

    Raises:
        ValueError: the folder cannot be made or written to.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir!r} cannot be written to ({error.strerror or error}); choose another folder or "
            "change its permissions"
        ) from error


def newest_checkpoint(output_dir: str) -> str:
    """Returns the newest checkpoint that was written to its end; one that was cut off has no trainer state.

    Raises:
        ValueError: there is none.
    """
    found = [
        path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.split("-")[-1].isdigit() and (path / TRAINER_STATE_NAME).is_file()
    ]
    if not found:
        raise ValueError(f"resume_from_checkpoint=True: no complete checkpoint in output_dir={output_dir!r}")
    return str(max(found, key=lambda path: int(path.name.split("-")[-1])))
