"""Training in forks that are killed: this process imports everything once, each fork trains and dies."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from trl_fast.trainers.checkpoints.folders import newest_checkpoint
from trl_fast.trainers.checkpoints.random_states import random_states, set_random_states

# A fork that takes longer hangs.
PATIENCE = 60


def forked(work: Callable[[], object], log: Path, patience: float = PATIENCE / 2) -> int:
    """Runs `work` in a fork, what it prints goes to a file; the fork's process id.

    patience: seconds after which all stacks of the fork are printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        torch.set_num_threads(1)
        replace_tqdm_locks()
        faulthandler.dump_traceback_later(patience, file=sys.stderr)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def replace_tqdm_locks(lock: Any = None, kind: type[tqdm] = tqdm) -> None:
    """Gives tqdm's classes a lock of this process alone.

    Their own one is shared with the processes that fork from it, and who is killed while holding it leaves it locked.
    A subclass may have got a lock of its own.
    """
    lock = lock or threading.RLock()
    kind.set_lock(lock)
    for inner in kind.__subclasses__():
        replace_tqdm_locks(lock, inner)


def wait(process: int) -> int:
    """Waits for a fork; its exit status, or minus the signal that has ended it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGALRM


class Forks:
    """Trains one and the same trainer, which this process never trains, in forks.

    trainer: made in this process. folder: its output folder.
    """

    def __init__(self, trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._random = random_states()

    def train(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        set_random_states(self._random)
        try:
            newest: str | None = newest_checkpoint(str(self.folder))
        except ValueError:
            newest = None
        self.trainer.train(resume_from_checkpoint=newest)

    def start(self) -> int:
        return forked(self.train, self.log)

    def finish(self, process: int | None = None) -> float:
        """Lets a fork come to its end; the seconds it took."""
        start = time.monotonic()
        assert wait(self.start() if process is None else process) == 0, self.log.read_text()
        return time.monotonic() - start

    def kill(self, chance: random.Random, seconds: float) -> bool:
        """Starts a fork and kills it at a random moment, two times out of three while a checkpoint is written.

        seconds: what a whole run takes. Returns whether it was killed before it came to its end.
        """
        process = self.start()
        if chance.random() < 2 / 3:
            self._await_writing(process, chance)
            time.sleep(chance.uniform(0, 0.06))
        else:
            time.sleep(chance.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        status = wait(process)
        assert status in (0, -signal.SIGKILL), self.log.read_text()
        return status == -signal.SIGKILL

    def _await_writing(self, process: int, chance: random.Random) -> None:
        """Waits until one of the next checkpoints is begun, or the fork has ended."""
        begun: set[str] = set()
        leave_out = {path.name for path in self.folder.glob("tmp-*")}
        skipped = chance.randrange(2)
        end = time.monotonic() + PATIENCE
        while len(begun) <= skipped:
            assert time.monotonic() < end, f"it hangs: {self.log.read_text()}"
            begun |= {path.name for path in self.folder.glob("tmp-checkpoint-*")} - leave_out
            # Not reaped here: `wait` does.
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0005)
