"""Tests the extension's memory pool: memory returns to it, it is bounded, and its tensors are ordinary ones."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.memory import MIB, measure_peak
from support.forks import forked
from support.heads import error, make_problem
from trl_fast import _C
from trl_fast.ops import linear_logprob
from trl_fast.ops.memory_pool import pooled_empty

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS holds on Linux only")


@pytest.fixture(autouse=True)
def empty_pool():
    _C.release_pool()
    yield
    _C.release_pool()


def take(mib: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return pooled_empty((int(mib * MIB) // dtype.itemsize,), dtype, CPU)


def test_a_freed_block_serves_the_next_tensor():
    first = take(20)
    address = first.data_ptr()
    del first
    assert _C.pool_free_bytes() == 20 * MIB
    assert take(17, torch.bfloat16).data_ptr() == address


def test_tensors_that_live_at_once_lie_apart():
    first = take(20)
    second = take(20).fill_(2.0)
    first.fill_(1.0)
    assert (second == 2.0).all() and (first == 1.0).all()


def test_a_block_is_not_wasted_on_a_small_tensor():
    del_me = take(40)
    address = del_me.data_ptr()
    del del_me
    assert take(18).data_ptr() != address


def test_a_larger_block_replaces_a_smaller_one():
    del_me = take(20)
    del del_me
    larger = take(30)
    assert _C.pool_free_bytes() == 0
    del larger
    assert _C.pool_free_bytes() == _C.release_pool() == 30 * MIB
    assert _C.pool_free_bytes() == 0


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        pytest.param("0", 0, marks=pytest.mark.slow),
        (str(30 * MIB), 20 * MIB),
        pytest.param(str(50 * MIB), 44 * MIB, marks=pytest.mark.slow),
    ],
)
def test_the_free_memory_is_bounded(limit, kept):
    code = (
        "import torch\n"
        "from trl_fast.ops.memory_pool import pooled_empty\n"
        "from trl_fast.ops.backends import load_extension\n"
        "assert load_extension().ok\n"
        "blocks = [pooled_empty((m << 20,), torch.int8, torch.device('cpu')) for m in (24, 20)]\n"
        "del blocks[0]\n"
        "del blocks[0]\n"
        "from trl_fast import _C\n"
        "print(_C.pool_free_bytes())\n"
    )
    environment = {**os.environ, "TRL_FAST_HELD_BYTES": limit}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(run.stdout) == kept


def test_a_limit_that_is_no_number_is_named():
    code = (
        "import os, torch\n"
        "from trl_fast.ops.memory_pool import pooled_empty\n"
        "for limit in ('2GiB', '-1', '1e9', '9' * 30):\n"
        "    os.environ['TRL_FAST_HELD_BYTES'] = limit\n"
        "    try:\n"
        "        pooled_empty((20 << 20,), torch.int8, torch.device('cpu'))\n"
        "    except ValueError as error:\n"
        "        print(str(error).splitlines()[0])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "TRL_FAST_HELD_BYTES={}: expected a whole number of bytes, such as 2147483648"
    assert run.stdout.splitlines() == [expected.format(limit) for limit in ("2GiB", "-1", "1e9", "9" * 30)]


def test_pooled_tensors_are_ordinary_ones():
    tensor = take(16).fill_(1.0)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().size() == 0
    tensor.untyped_storage().resize_(16 * MIB)
    assert torch.equal(take(16).fill_(3.0).clone(), torch.full((4 * MIB,), 3.0))


def test_the_profiler_sees_pooled_memory_as_used():
    def use():
        take(32).fill_(1.0)

    use()
    assert measure_peak(use).peak_bytes >= 32 * MIB


def test_two_graphs_do_not_share_their_logits():
    problems = [make_problem(40, 120_000, seed=seed) for seed in range(2)]
    losses = [linear_logprob(p.hidden, p.weight, p.targets, backend="cpp").logprobs.sum() for p in problems]
    for problem, loss in zip(problems, losses, strict=True):
        got = torch.autograd.grad(loss, problem.leaves, retain_graph=True)
        logp = problem.logits(torch.float64).log_softmax(-1).gather(1, problem.targets[:, None])
        for grad, exact in zip(got, torch.autograd.grad(logp.sum(), problem.leaves), strict=True):
            assert error(grad, exact) < 5e-6


def address_space_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() // MIB


class HeapFacts(ctypes.Structure):
    """Describes the C library's heap: `struct mallinfo2`, of whose ten numbers the ninth is what is free in it."""

    _fields_ = [("others", ctypes.c_size_t * 8), ("free", ctypes.c_size_t), ("trimmable", ctypes.c_size_t)]


def heap_room_mib() -> int:
    """Returns how much the heap can give without asking the system, where it lies in one piece."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapFacts
    return mallinfo2().free // MIB + 1


def hold_and_limit(held_mib: int, spare_mib: int) -> int:
    """Fills the pool, and leaves the process so much more address space than it has now; returns the pool's MiB.

    The pool rounds the sizes of its blocks up.
    """
    blocks = [take(held_mib / 4) for _ in range(4)]
    del blocks
    held = _C.pool_free_bytes() // MIB
    assert held_mib <= held < held_mib * 1.2
    most = (address_space_mib() + spare_mib) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return held


@linux
def test_released_memory_leaves_the_address_space_whatever_room_the_heap_has():
    def work() -> None:
        take(20)  # what the first call of all loads is no part of the difference
        _C.release_pool()
        # Freed blocks of up to 32 MiB raise the size from which malloc maps pages, and leave room in the heap.
        for mib in (31, 30):
            torch.empty(mib * MIB, dtype=torch.int8)
        parts = [torch.empty(20 * MIB, dtype=torch.int8) for _ in range(20)]
        full = address_space_mib()
        # The heap only shrinks from its top, where one part stays.
        parts = [max(parts, key=torch.Tensor.data_ptr)]
        before = address_space_mib()
        assert parts and before > full - 20
        block = take(80)
        assert address_space_mib() >= before + 80
        del block
        _C.release_pool()
        assert address_space_mib() <= before

    forked(work)


@linux
def test_held_memory_gives_way_to_a_sweep_where_address_space_is_short():
    problem = make_problem(256, 60_000)

    def gradients() -> list[torch.Tensor]:
        out = linear_logprob(problem.hidden, problem.weight, problem.targets, backend="cpp")
        return [out.logprobs.detach(), *torch.autograd.grad(out.logprobs.sum(), problem.leaves)]

    def work() -> None:
        expected = gradients()
        _C.release_pool()
        # Each held block is more than twice too large for the logits that are kept, 59 MiB.
        hold_and_limit(held_mib=512, spare_mib=24)
        for found, usual in zip(gradients(), expected, strict=True):
            assert torch.equal(found, usual)

    forked(work)


@linux
def test_held_memory_gives_way_to_any_tensor_and_says_so_once():
    def work() -> None:
        # What earlier tests freed may lie in the heap, and would serve a tensor without any of the held memory.
        room = heap_room_mib()
        held = hold_and_limit(320 + room, spare_mib=24)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.ones((held - 120) * MIB, dtype=torch.int8)[-1] == 1
            assert _C.pool_free_bytes() == 0
            blocks = [take(40) for _ in range(3)]
            del blocks
            # More than is left and the heap has besides, less than is left once the pool is empty.
            torch.empty((held + 10) * MIB, dtype=torch.int8)
            assert _C.pool_free_bytes() == 0
        assert [f"memory is short, so {held} MiB" in str(warning.message) for warning in said] == [True]

    forked(work)


@linux
def test_what_does_not_fit_without_the_held_memory_either_keeps_its_own_error():
    def work() -> None:
        hold_and_limit(held_mib=160, spare_mib=24)
        with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate 1073741824 bytes"):
            torch.empty(1 << 30, dtype=torch.int8)
        with pytest.raises(torch.OutOfMemoryError, match="trl_fast: no memory for 1073741824 bytes"):
            take(1024)

    forked(work)
