"""Ends all processes of a run when one of them fails, with that one's error, instead of leaving them to wait for it.

A process that raises within a step never comes to the collective operation in which the others wait: NCCL and gloo
give up after `ddp_timeout`, half an hour. So each process has a thread that looks into the store of the process group
(a table of keys that all processes reach over TCP). Who fails writes its error there. The others' threads print it,
abort their collective operations, and end their process if it does not end by itself.
"""

from __future__ import annotations

import atexit
import base64
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.distributed import distributed_c10d

from trl_fast.input_errors import is_raised_on_purpose

from .agreement import error_for_others, is_alone

logger = logging.getLogger(__name__)

# Seconds between two looks into the store.
LOOK_EVERY = 0.5
# Seconds in which a process that has learned of a failure may come to an error of its own.
GRACE = 1.0
# Seconds until a process that does not end is ended; as long as one that has failed waits for the others to notice.
LIMIT = 20.0
# The part of a run outside of all sections.
_OUTSIDE = "outside"


class _Section(NamedTuple):
    """Names a part of the run, and says when this process has left it."""

    name: str
    left: threading.Event


class _Watch:
    """Tells the other processes of this one's failures, and ends this one for theirs.

    A section is a part of the run that all processes enter and leave together, such as a training. The user may catch
    what fails in one, and the next section begins anew.

    store: that of the process group, a `torch.distributed.Store`.
    """

    def __init__(self, store: Any) -> None:
        # A connection of its own: the process group may wait for an answer over the other one.
        self.store, self._own = store, store.clone()
        self._own.set_timeout(timedelta(seconds=LIMIT))
        self._process, self._pid = torch.distributed.get_rank(), os.getpid()
        self._everyone = range(torch.distributed.get_world_size())
        self._sections = 0
        self._section: _Section | None = None
        # Of the present section, the failure of another process; and the last error of this one that all know.
        self._failure: Exception | None = None
        self._known: BaseException | None = None
        # Outside of sections nothing is left before the process ends.
        self._outside = _Section(_OUTSIDE, threading.Event())
        self._aborted = False
        threading.Thread(target=self._look, name="trl_fast failures", daemon=True).start()
        atexit.register(self._outside.left.set)

    # ---- what the main thread calls

    @contextmanager
    def section(self) -> Iterator[None]:
        """Tells the others of what fails within; raises another process's failure in the place of its consequences.

        Raises:
            Exception: another process failed, as `error_for_others` tells it.
        """
        if self._section is not None or os.getpid() != self._pid:
            yield
            return
        self._sections += 1
        self._failure = None
        self._section = section = _Section(f"section {self._sections}", threading.Event())
        try:
            yield
        except BaseException as error:
            section.left.set()
            of_another = self._tell(section.name, error)
            if of_another is not None and (self._aborted or _is_of_waiting(error)):
                self._known = of_another
                raise of_another from error
            raise
        finally:
            section.left.set()
            self._section = None

    def tell(self, error: BaseException) -> None:
        """Tells the others of an error that ends this process, unless they know it."""
        if error is not self._known and os.getpid() == self._pid:
            self._tell(_OUTSIDE, error)

    def _tell(self, section: str, error: BaseException) -> Exception | None:
        """Writes a failure into the store, unless there is one, and waits until all others have read it.

        Returns the one that is there, if it is another process's.
        """
        told = base64.b64encode(pickle.dumps((self._process, error_for_others(self._process, error)))).decode()
        try:
            process, first = _read(self._own.compare_set(_failure_key(section), "", told))
            self._notice(section)
            end = time.monotonic() + LIMIT / 2
            while process == self._process and not self._is_noticed(section):
                if time.monotonic() > end:  # who has left the section already hears of an error that nobody catches
                    return None
                time.sleep(0.05)
        except RuntimeError:  # who held the store is gone
            return self._failure
        self._known = error
        return None if process == self._process else first

    def _notice(self, section: str) -> None:
        self._own.set(f"{_failure_key(section)} noticed by {self._process}", "")

    def _is_noticed(self, section: str) -> bool:
        return self._own.check([f"{_failure_key(section)} noticed by {process}" for process in self._everyone])

    # ---- the thread

    def _look(self) -> None:
        while not self._outside.left.wait(LOOK_EVERY):
            section = self._section
            try:
                for place in [self._outside] if section is None else [self._outside, section]:
                    if self._own.check([_failure_key(place.name)]):
                        self._give_way(place, *_read(self._own.get(_failure_key(place.name))))
            except RuntimeError:
                # At the end of a run the store goes with the process that holds it.
                if section is not None and not section.left.wait(LIMIT / 2):
                    self._end("the store of the process group is gone, and with it process 0 or the launcher")
                return

    def _give_way(self, place: _Section, process: int, failure: Exception) -> None:
        """Ends what this process does, for the failure of another one."""
        if process == self._process:
            return
        self._failure = failure
        if place is not self._outside and place.left.wait(GRACE):
            return  # this process has failed too
        print(f"process {self._process}: {failure}", file=sys.stderr, flush=True)
        self._notice(place.name)
        self._aborted = True
        _abort_collectives()
        if not place.left.wait(LIMIT):
            self._end(f"{failure}; this process has not ended by itself")

    def _end(self, why: str) -> None:
        print(f"process {self._process}: {why}; it is ended", file=sys.stderr, flush=True)
        os._exit(1)


def _read(told: bytes) -> tuple[int, Exception]:
    """Returns the process that a failure in the store is of, and the error that tells of it."""
    return pickle.loads(base64.b64decode(told))


def _failure_key(section: str) -> str:
    return f"trl_fast: failure in {section}"


def _is_of_waiting(error: BaseException) -> bool:
    """Says whether an error may only tell that another process did not come to a collective operation.

    Such an error comes from torch's C++ code, not from a `raise` statement.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    return type(error) is RuntimeError and not is_raised_on_purpose(error)


def _abort_collectives() -> None:
    """Lets collective operations that wait end with an error, where their backend can do so; gloo's wait on."""
    try:
        distributed_c10d._abort_process_group()
    except Exception as error:
        logger.warning(f"Waiting for other processes could not be ended: {error}")


_watch: _Watch | None = None


def watch_failures() -> _Watch | None:
    """Looks from now on for failures of other processes, and tells them of errors that end this one.

    Returns what does so; None for a process alone, where nothing is done.
    """
    global _watch
    if is_alone():
        return None
    store = distributed_c10d._get_default_store()
    if store is None:  # MPI has none
        return None
    if _watch is None:
        sys.excepthook = _telling(sys.excepthook)
    if _watch is None or _watch.store is not store:
        _watch = _Watch(store)
    return _watch


def _telling(show: Callable[..., object]) -> Callable[..., None]:
    def show_and_tell(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
        show(kind, error, place)
        tell_failure(error)

    return show_and_tell


def tell_failure(error: BaseException) -> None:
    """Tells the other processes, if there are any, of an error that ends this one."""
    if _watch is not None:
        _watch.tell(error)


@contextmanager
def failing_together() -> Iterator[None]:
    """Lets what fails within, in any process, end what all processes do within, with that one's error.

    All processes enter and leave together. A process that waits for another one in a collective operation is freed or
    ended; it raises, or at least prints, which process failed, and of what. A process alone does nothing here.

    Raises:
        Exception: another process failed, as `agreement.error_for_others` tells it.
    """
    watch = watch_failures()
    if watch is None:
        yield
        return
    with watch.section():
        yield
