"""Freed memory stays in the heap while a trainer trains on a CPU, and is given back afterwards."""

import os
import resource
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from support.forks import fresh
from trl_fast.ops.heap import _glibc, freed_memory_kept

pytestmark = pytest.mark.skipif(sys.platform != "linux" or _glibc() is None, reason="the C library is not glibc")
CPU = torch.device("cpu")
MIB = 1 << 20
SIZES_MIB = (100, 40, 70)


def step() -> None:
    """Takes and frees tensors as a training step does: larger than what glibc keeps by itself."""
    tensors = [torch.empty(mib * MIB, dtype=torch.uint8).fill_(1) for mib in SIZES_MIB]
    del tensors


def faults() -> int:
    """Counts the pages that a step meets, the least of some steps: a fork's own first writes are among others'."""
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // MIB


@pytest.fixture
def no_choices(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "TRL_FAST_HELD"))]:
        monkeypatch.delenv(name)


def a_second_step() -> None:
    usual = faults()
    before = resident_mib()
    with freed_memory_kept(CPU):
        assert faults() < 20 < usual
        assert resident_mib() > before + sum(SIZES_MIB) / 2
    assert resident_mib() < before + sum(SIZES_MIB) / 2
    assert faults() > 20


def an_error() -> None:
    before = resident_mib()
    with pytest.raises(RuntimeError, match="of the step"), freed_memory_kept(CPU):
        step()
        raise RuntimeError("of the step")
    assert resident_mib() < before + sum(SIZES_MIB) / 2


def nothing_kept() -> None:
    step()
    for device, choice in (
        ("cuda", {}),
        ("cpu", {"TRL_FAST_HELD_BYTES": "0"}),
        ("cpu", {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        ("cpu", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}),
    ):
        before = resident_mib()
        with patch.dict(os.environ, choice), freed_memory_kept(torch.device(device)):
            step()
            assert resident_mib() < before + sum(SIZES_MIB) / 2, (device, choice)


def test_a_second_step_meets_no_fresh_pages_and_the_end_gives_all_back(no_choices):
    fresh(__name__, "a_second_step")


def test_an_error_gives_it_back_too(no_choices):
    fresh(__name__, "an_error")


def test_nothing_is_done_for_another_device_or_against_a_choice(no_choices):
    fresh(__name__, "nothing_kept")
