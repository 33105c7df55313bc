"""Freed memory stays in the process while a trainer trains on a CPU, and is given back afterwards."""

import gc
import os
import random
import resource
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from support.forks import fresh
from trl_fast import _C
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
        step()
        lasting = [bytes(1000 + 10 * i) for i in range(1000)]
        assert faults() < 20 < usual
        assert before + sum(SIZES_MIB) / 2 < resident_mib() < before + sum(SIZES_MIB) * 1.1
        assert len(lasting) == 1000
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


def places(sizes: list[int], order: list[int]) -> list[int]:
    """Makes tensors of so many bytes, and frees them in an order; returns where they were."""
    tensors: list = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    found = [tensor.data_ptr() for tensor in tensors]
    for index in order:
        tensors[index] = None
    return found


def the_same_places() -> None:
    draw = random.Random(0)
    sizes = [draw.randrange(MIB, 9 * MIB) for _ in range(60)]
    order = draw.sample(range(60), 60)
    with freed_memory_kept(CPU):
        of_one_size = places([4 * MIB] * 20, list(range(20)))
        assert len({place % 4096 for place in of_one_size}) == 20, "tensors begin at the same place of a page"
        first = places(sizes, order)
        assert all(place % 64 == 0 for place in first)
        assert places(sizes, order) == first
        # All holes have become one.
        begin, end = min(first), max(place + size for place, size in zip(first, sizes, strict=True))
        assert torch.empty(end - begin, dtype=torch.uint8).data_ptr() == begin


def whole_numbers() -> None:
    """Tensors of all sizes, freed in any order and by several threads, keep their numbers."""

    def work(seed: int) -> None:
        draw, kept = random.Random(seed), []
        for i in range(300):
            value = draw.randrange(256)
            kept.append((value, torch.full((draw.randrange(1, 3 * MIB),), value, dtype=torch.uint8)))
            if len(kept) > 12:
                value, tensor = kept.pop(draw.randrange(len(kept)))
                wrong.extend([i] if not bool((tensor == value).all()) else [])
        left.extend(kept)

    wrong, left = [], []
    with freed_memory_kept(CPU):
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # What is in use when the context ends stays as it is; what is freed after it goes at once.
    assert not wrong and len(left) == 36 and all(bool((tensor == value).all()) for value, tensor in left)
    large = torch.ones(50 * MIB, dtype=torch.uint8)
    with freed_memory_kept(CPU):
        kept = torch.ones(50 * MIB, dtype=torch.uint8)
    before = resident_mib()
    del kept, large
    gc.collect()
    assert resident_mib() < before - 80


def ordinary_tensors() -> None:
    with freed_memory_kept(CPU):
        tensor = torch.arange(2 * MIB, dtype=torch.float32)
        assert tensor.clone().resize_(3 * MIB)[: 2 * MIB].equal(tensor)
        assert torch.from_numpy(tensor.numpy()).equal(tensor)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.arange(2 * MIB, dtype=torch.float32).equal(tensor) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert tensor.share_memory_().is_shared()
        with freed_memory_kept(CPU):
            step()
        assert faults() < 20, "the outer context has ended"


def a_child() -> None:
    """A process that is forked while a trainer trains, as for a loader's workers, has tensors but not what is free."""
    with freed_memory_kept(CPU):
        tensor = torch.ones(2 * MIB)
        step()
        before = resident_mib()
        child = os.fork()
        if child == 0:
            freed = before - resident_mib()
            os._exit(0 if freed > sum(SIZES_MIB) / 2 and tensor.sum() == 2 * MIB else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert resident_mib() > before - sum(SIZES_MIB) / 2 and faults() < 20


def tensors_of_the_heap() -> None:
    the_same_places()
    whole_numbers()
    ordinary_tensors()
    a_child()


def no_addresses() -> None:
    messages: list[str] = []
    with patch("trl_fast.ops.heap.logger.warning", messages.append):
        # The former would be enough for the heap's addresses, and for little else.
        for limit in (os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() + (6 << 30), 4 << 30):
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            with freed_memory_kept(CPU):
                step()
                assert torch.ones(2 * MIB).sum() == 2 * MIB
            assert not _C.keep_freed()
    assert len(messages) == 1 and "ulimit -v" in messages[0], messages


def test_large_tensors_come_from_a_heap_of_their_own(no_choices):
    fresh(__name__, "tensors_of_the_heap")


def test_where_addresses_are_limited_the_c_library_keeps_what_is_freed(no_choices):
    fresh(__name__, "no_addresses")


def test_a_second_step_meets_no_fresh_pages_and_the_end_gives_all_back(no_choices):
    fresh(__name__, "a_second_step")


def test_an_error_gives_it_back_too(no_choices):
    fresh(__name__, "an_error")


def test_nothing_is_done_for_another_device_or_against_a_choice(no_choices):
    fresh(__name__, "nothing_kept")
