"""Lets all processes of a run take the same value, and fail with the same error, where one alone finds it.

A process that goes another way than the others leaves them waiting for it in their next collective operation. So what
is found by looking at data, weights or files is found by one process for all, or told to all. All functions here are
collective: every process calls them, in the same order. With one process they cost nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState

from trl_fast.input_errors import is_input_error

T = TypeVar("T")


def is_alone() -> bool:
    """Tells whether this process runs without others."""
    return not _has_group() or torch.distributed.get_world_size() == 1


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def decided_by_first(make: Callable[[], T]) -> T:
    """Returns in all processes what `make` returns in process 0, the only one that calls it.

    make: returns something that can be pickled; it calls no collective operation.

    Raises:
        Exception: in all processes, what `make` raises.
    """
    if is_alone():
        return make()
    told: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
        torch.distributed.broadcast_object_list([told[0], _portable(0, told[1])])
    else:
        torch.distributed.broadcast_object_list(told)
    value, error = told
    if error is not None:
        raise error
    return value


def together(work: Callable[[], T]) -> T:
    """Returns what `work` returns in this process, when it has succeeded in all of them.

    work: calls no collective operation, which a process that failed would not reach.

    Raises:
        Exception: in the process whose `work` raises it.
        ValueError, RuntimeError: in the others: number and text of the first process that failed. ValueError where
            the error is one of the user's input.
    """
    if is_alone():
        return work()
    failure: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as error:
        failure = error
    agree_on_failure(failure)
    return value


def agree_on_failure(failure: Exception | None) -> None:
    """Tells all processes of a failure in this one, None for none, and raises in all if there is one in any.

    Raises:
        Exception: as in `together`.
    """
    error = first_failure(failure)
    if error is not None:
        raise error


def first_failure(failure: Exception | None) -> Exception | None:
    """Returns this process's failure, else an error that tells of the first process that failed, None if none did."""
    if is_alone():
        return failure
    told = None if failure is None else (is_input_error(failure), describe(failure))
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, told)
    failed = [process for process, found in enumerate(every) if found is not None]
    if failure is not None or not failed:
        return failure
    of_input, text = every[failed[0]]
    return (ValueError if of_input else RuntimeError)(f"process {failed[0]} failed: {text}")


def describe(error: BaseException) -> str:
    """Returns an error's type and text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _portable(process: int, error: Exception | None) -> Exception | None:
    """Returns an error as other processes can read it: itself, or one with its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if error is None or (type(copy) is type(error) and str(copy) == str(error)):
        return error
    return RuntimeError(f"process {process} failed: {describe(error)}")


def largest_over_ranks(number: int) -> int:
    """Returns the largest of all processes' numbers."""
    if is_alone():
        return number
    told = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return int(told.item())
