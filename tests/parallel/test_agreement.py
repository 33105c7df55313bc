"""Values and errors that two processes agree on; each process tells what it got."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed

from support.ranks import run_on_ranks
from trl_fast.parallel.agreement import decided_by_first, first_of_machine_first, largest_over_ranks, together


class OddError(Exception):
    """An error that cannot be made again from its text."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def outcome(call):
    """Returns what a call returns, or its error's type and text."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail_in(rank, error):
    """Raises an error in one process; returns the process's number in the others."""
    own = torch.distributed.get_rank()
    if own == rank:
        raise error
    return own


def asked():
    """Returns all answers of one process."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    calls = []
    return {
        "decided": decided_by_first(lambda: calls.append(1) or {"rank": rank}),
        "calls": len(calls),
        "refused": outcome(lambda: decided_by_first(lambda: fail_in(0, ValueError("row 3 is bad")))),
        "odd": outcome(lambda: decided_by_first(lambda: fail_in(0, OddError("one", "two")))),
        "each": together(lambda: rank),
        "of one": outcome(lambda: together(lambda: fail_in(1, ValueError("row 3 is bad")))),
        "of the program": outcome(lambda: together(lambda: fail_in(1, KeyError("name")))),
        "of all": outcome(lambda: together(lambda: fail_in(rank, ValueError(f"row {rank}")))),
        "largest": largest_over_ranks(5 - rank),
    }


def test_two_processes_agree():
    first, second = run_on_ranks(asked, engine=None)
    assert first["decided"] == second["decided"] == {"rank": 0}
    assert (first["calls"], second["calls"]) == (1, 0)
    assert first["refused"] == second["refused"] == "ValueError: row 3 is bad"
    assert first["odd"] == "OddError: one and two"
    assert second["odd"] == "RuntimeError: process 0 failed: OddError: one and two"
    assert (first["each"], second["each"]) == (0, 1)
    assert first["of one"] == "ValueError: process 1 failed: row 3 is bad"
    assert second["of one"] == "ValueError: row 3 is bad"
    assert first["of the program"] == "RuntimeError: process 1 failed: KeyError: 'name'"
    assert (first["of all"], second["of all"]) == ("ValueError: row 0", "ValueError: row 1")
    assert first["largest"] == second["largest"] == 5


def worked():
    """Returns when this process has begun and ended two works, which take longer than collective operations wait."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=1.5))
    rank = torch.distributed.get_rank()
    times = []
    for seconds in (2, 0.1):
        with first_of_machine_first(rank):
            times.append(time.monotonic())
            time.sleep(0 if rank else seconds)
            times.append(time.monotonic())
    torch.distributed.barrier()  # process 0 has the store
    return times


def test_the_others_of_a_machine_wait_for_the_first_however_long_it_takes():
    first, second = run_on_ranks(worked, engine=None)
    assert first[1] <= second[0] and first[3] <= second[2]


def test_a_process_alone_is_asked_itself():
    assert decided_by_first(lambda: 3) == together(lambda: 3) == largest_over_ranks(3) == 3
    with pytest.raises(ValueError, match="^row 3$"):
        together(lambda: fail_alone())


def fail_alone():
    """Raises an error of the user's input."""
    raise ValueError("row 3")
