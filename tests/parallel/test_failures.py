"""A process that fails alone: the other one ends with its error, while it waits or works."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.distributed

from support.ranks import RankError, run_on_ranks
from trl_fast.parallel import failures
from trl_fast.parallel.failures import failing_together, watch_failures


def outcome(work):
    """Returns a work's result, or its error's type and text, and that of its cause."""
    try:
        with failing_together():
            return work()
    except BaseException as error:
        cause = type(error.__cause__).__name__ if error.__cause__ is not None else None
        return f"{type(error).__name__}: {error}", cause


def fail_or(rank, error, work):
    """Raises an error in one process, and works in the others."""
    if torch.distributed.get_rank() == rank:
        raise error
    return work()


def wait_for_all():
    torch.distributed.all_reduce(torch.ones(2))
    return "done"


def sections(failing):
    """Returns what four sections come to, in the last of which the process `failing` fails alone."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    began = time.monotonic()
    return {
        "all": outcome(wait_for_all),
        "each its own": outcome(lambda: fail_or(rank, RuntimeError(f"row {rank}"), wait_for_all)),
        "and on": outcome(wait_for_all),
        "one": outcome(lambda: fail_or(failing, FloatingPointError("step 3: no number"), wait_for_all)),
        "seconds": time.monotonic() - began,
    }


def test_a_process_that_fails_ends_the_one_that_waits():
    for failing in (1, 0):
        found = run_on_ranks(sections, failing, engine=None)
        for rank, outcomes in enumerate(found):
            assert outcomes["all"] == outcomes["and on"] == "done"
            assert outcomes["each its own"] == (f"RuntimeError: row {rank}", None)
            assert outcomes["seconds"] < 10
        own, other = found[failing]["one"], found[1 - failing]["one"]
        assert own == ("FloatingPointError: step 3: no number", None)
        assert other == (
            f"FloatingPointError: process {failing} failed: step 3: no number",
            "RuntimeError",
        )


def fail_alone(when):
    """Fails in process 1, while process 0 waits for it, computes without end, or does so after a section."""
    torch.distributed.init_process_group("gloo")
    failures.LIMIT = 1.0
    if when == "caught":
        outcome(lambda: fail_or(1, KeyError("column"), wait_for_all))
        time.sleep(1000)
    watch_failures()
    try:
        with failing_together() if when == "at the end of a section" else nullcontext():
            fail_or(1, KeyError("column"), lambda: None)
        time.sleep(1000)
    except KeyError:
        sys.excepthook(*sys.exc_info())  # as Python does for an error that nobody catches


@pytest.mark.parametrize(
    "when",
    ["uncaught", *(pytest.param(name, marks=pytest.mark.slow) for name in ("caught", "at the end of a section"))],
)
def test_a_process_that_does_not_end_by_itself_is_ended(when):
    with pytest.raises(RankError) as found:
        run_on_ranks(fail_alone, when, engine=None, patience=20)
    text = str(found.value)
    assert "rank 0 ended with status 1" in text
    assert "process 0: process 1 failed: KeyError: 'column'; this process has not ended by itself" in text
