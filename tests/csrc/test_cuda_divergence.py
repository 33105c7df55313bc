"""Tests the CUDA kernel of divergences, compiled as host C++: against float64, and under two sanitizers."""

from __future__ import annotations

import ctypes
import re

import pytest

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from support.divergence_rows import (
    FORMULAS,
    PLAIN,
    TRANSFORMED,
    check_empty,
    check_narrow_gradient,
    check_offsets_beyond_32_bits,
    check_rows,
    check_small_probabilities,
)
from support.host_kernels import DivergenceArgs, HostDivergence, run_sanitized
from support.targets import QUICK_TARGETS

pytestmark = pytest.mark.gpu_code


@pytest.fixture(scope="module")
def kernel(compile_host) -> HostDivergence:
    return HostDivergence(compile_host("divergence_simt.cpp", "-shared", "-fPIC"))


def test_structures_are_those_of_the_kernel(kernel):
    kernel.library.simt_divergence_bytes.restype = ctypes.c_int64
    assert kernel.library.simt_divergence_bytes() == ctypes.sizeof(DivergenceArgs)


@pytest.mark.parametrize("numbers", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_rows_against_float64(kernel, formula, numbers):
    """Rows around a thread's share and a chunk, wherever they start."""
    for columns, misplaced in ((1, 0), (7, 1), (8, 0), (2047, 1), (2056, 0), (4099, 2), (4100, 0)):
        check_rows(kernel, columns, FORMULAS[formula], numbers, misplaced=misplaced)


@pytest.mark.parametrize("columns, misplaced", [(5, 1), (2056, 0), (6001, 0), (6001, 3)])
def test_narrow_gradients(kernel, columns, misplaced):
    for formula in ("forward KL", "jsd 0.1"):
        check_narrow_gradient(kernel, columns, FORMULAS[formula], misplaced)


@pytest.mark.parametrize("formula", FORMULAS)
def test_tokens_whose_probabilities_have_no_product_in_float32(kernel, formula):
    check_small_probabilities(kernel, FORMULAS[formula])


def test_empty_rows_and_far_ones(kernel):
    check_empty(kernel)
    check_offsets_beyond_32_bits(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_compiled_kernels_do_not_spill(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    found = [k for k in compile_cuda_kernels(nvcc, target) if k.label.startswith("row_divergence")]
    assert len({kernel.label for kernel in found}) == len(found) == 12
    for kernel in found:
        assert kernel.resources.spill_bytes == 0 and kernel.resources.occupancy >= 0.25, kernel
        # In whole rows two sixteen-byte loads a head and sweep, once before its loop; as much in others.
        assert kernel.resources.vector_loads >= 32 and kernel.resources.vector_stores > 0, kernel


@pytest.mark.slow
def test_no_races_and_a_missing_barrier_is_found(compile_host):
    clean = run_sanitized(compile_host("divergence_sanitized.cpp", "-fsanitize=thread"), "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    plant = "-DTRL_FAST_PLANT_MISSING_BARRIER"
    broken = run_sanitized(compile_host("divergence_sanitized.cpp", "-fsanitize=thread", plant), "clean")
    assert broken.returncode != 0
    # Of the block's sums, and of the row that a narrow gradient is written over.
    for place in ("data race", "merged_block", "store_share"):
        assert place in broken.stderr, broken.stderr[:4000]


def test_no_access_out_of_bounds_and_planted_ones_are_found(compile_host):
    flags = ("-fsanitize=address", "-fsanitize-sections=simt_shared")
    program = compile_host("divergence_sanitized.cpp", *flags)
    clean = run_sanitized(program, "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    for what in ("reads-behind-the-row", "reads-behind-the-bias"):
        broken = run_sanitized(program, what)
        assert broken.returncode != 0
        assert re.search("heap-buffer-overflow.*READ", broken.stderr, re.DOTALL), broken.stderr[:4000]
