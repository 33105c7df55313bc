"""Lets all processes of a run take the same value, and fail with the same error, where one alone finds it.

A process that goes another way than the others leaves them waiting for it in their next collective operation. So what
is found by looking at data, weights or files is found by one process for all, or told to all. All functions here are
collective: every process calls them, in the same order. With one process they cost nothing.
"""

from __future__ import annotations

import pickle
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from accelerate import PartialState
from torch.distributed import distributed_c10d

T = TypeVar("T")
_NONE = object()


def process_count() -> int:
    """Returns how many processes run together."""
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if has_group else 1


def is_alone() -> bool:
    """Tells whether this process runs without others."""
    return process_count() == 1


def decided_by_first(make: Callable[[], T], *, collective: bool = False) -> T:
    """Returns in all processes what `make` returns in process 0.

    Args:
        make: returns something that can be pickled. Process 0 alone calls it, so it calls no collective operation.
        collective: all processes call `make`, which may call collective operations; what the others get is dropped.

    Raises:
        Exception: in all processes, what `make` raises in process 0; with `collective`, also what it raises in others.
    """
    if is_alone():
        return make()
    is_first = torch.distributed.get_rank() == 0
    value: Any = None
    own: Exception | None = None
    if is_first or collective:
        try:
            value = make()
        except Exception as error:
            if not is_first:
                raise
            own = error
    told = [value, None if own is None else _portable(own)]
    torch.distributed.broadcast_object_list(told)
    failure = own or told[1]
    if failure is not None:
        raise failure
    return told[0]


def together(work: Callable[[], T]) -> T:
    """Returns what `work` returns in this process, when it has succeeded in all of them.

    work: calls no collective operation, which a process that failed would not reach.

    Raises:
        Exception: in the process whose `work` raises it; in the others, an error that names the first process that
            failed, as `error_for_others` makes it.
    """
    if is_alone():
        return work()
    failure: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as error:
        failure = error
    failure = first_failure(failure)
    if failure is not None:
        raise failure
    return value


def first_failure(failure: Exception | None) -> Exception | None:
    """Returns this process's failure, else the error that the first process which failed has for others; or None."""
    if is_alone():
        return failure
    told = None if failure is None else error_for_others(torch.distributed.get_rank(), failure)
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, told)
    return failure or next((error for error in every if error is not None), None)


def error_for_others(process: int, error: BaseException) -> Exception:
    """Returns an error that tells of a process's failure: of the same type where that takes a text, else RuntimeError.

    It can be pickled.
    """
    text = f"process {process} failed: {error}"
    try:
        found = pickle.loads(pickle.dumps(type(error)(text)))
    except Exception:
        found = None
    if isinstance(found, Exception) and str(found) == text:
        return found
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return RuntimeError(f"process {process} failed: {what}")


def _portable(error: Exception) -> Exception:
    """Returns an error of process 0 as other processes can read it: itself, or one that tells of it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return error_for_others(0, error)
    return error if type(copy) is type(error) and str(copy) == str(error) else error_for_others(0, error)


@contextmanager
def first_of_machine_first(local_process: int) -> Iterator[None]:
    """Lets the first process of each machine work within before the others of that machine, which find what it cached.

    These wait however long that takes, unlike in a collective operation: a large dataset may be tokenized for hours.

    local_process: this process's number in its machine; -1 where it is not known, and nobody waits.
    """
    if is_alone():
        yield
        return
    store, rank = distributed_c10d._get_default_store(), torch.distributed.get_rank()
    done = f"trl_fast: works of {platform.node()}"
    # All processes count their works alike.
    number = store.add(f"trl_fast: works seen by {rank}", 1)
    while local_process > 0 and store.add(done, 0) < number:
        time.sleep(0.05)
    try:
        yield
    finally:
        if local_process == 0:
            store.add(done, 1)


def while_all_have(items: Iterator[T]) -> Iterator[T]:
    """Yields items until one of the processes has no more: all processes get equal numbers of them.

    Items of the others that are left over by then are dropped.
    """
    while True:
        found = next(items, _NONE)
        if largest_over_ranks(int(found is _NONE)):
            return
        yield cast("T", found)


def largest_over_ranks(number: int) -> int:
    """Returns the largest of all processes' numbers."""
    if is_alone():
        return number
    told = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return int(told.item())
