"""Keeps an output folder to one run at a time, and makes sure that it can be written to."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK_FILE = ".trl_fast.lock"
OWNER_FILE = ".trl_fast.owner.json"
# Seconds in which processes of a run that was killed, such as data loader workers, notice it and end.
ORPHAN_PATIENCE = 15


class FolderInUseError(ValueError):
    """Tells that another run writes into the output folder."""


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


@contextmanager
def locked_folder(output_dir: str) -> Iterator[None]:
    """Locks an output folder for a run; the system frees the lock when the process ends, however it ends.

    Raises:
        FolderInUseError: another run has it.
    """
    os.makedirs(output_dir, exist_ok=True)
    lock = FileLock(os.path.join(output_dir, LOCK_FILE))
    try:
        _acquire(lock, output_dir)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise FolderInUseError(_in_use(output_dir)) from None
        logger.warning(f"output_dir={output_dir!r} cannot be locked ({error}): see that no second run writes into it.")
        yield
        return
    owner = Path(output_dir, OWNER_FILE)
    try:
        with suppress(OSError):
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _acquire(lock: FileLock, output_dir: str) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not _owner_is_dead(output_dir):
            raise
        logger.warning(
            f"output_dir={output_dir!r}: waiting up to {ORPHAN_PATIENCE} s for processes that a run which was killed "
            "has left."
        )
        lock.acquire(timeout=ORPHAN_PATIENCE)


def _owner(output_dir: str) -> tuple[int, str] | None:
    try:
        owner = json.loads(Path(output_dir, OWNER_FILE).read_text())
        return int(owner["pid"]), str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _owner_is_dead(output_dir: str) -> bool:
    owner = _owner(output_dir)
    if owner is None or owner[1] != socket.gethostname():
        return False
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _in_use(output_dir: str) -> str:
    owner = _owner(output_dir)
    who = "another run" if owner is None else f"the run of process {owner[0]} on {owner[1]}"
    if owner is not None and _owner_is_dead(output_dir):
        who = f"a process that the killed run {owner[0]} has left"
    return f"output_dir={output_dir!r} is in use by {who}; wait for its end, end it, or choose another folder"
