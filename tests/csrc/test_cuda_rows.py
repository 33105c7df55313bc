"""Tests the CUDA row kernels, compiled as host C++: against float64, and under two sanitizers."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from support.elementary_functions import check_exponential, check_tanh
from support.host_kernels import DTYPES, GradArgs, PackedRows, ScoreArgs, run_sanitized
from support.packed_rows import assert_as_good_as
from support.targets import QUICK_TARGETS
from trl_fast.ops.head.row_kernels import row_grad_reference, row_scores_reference
from trl_fast.ops.head.row_statistics import (
    BEFORE,
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    MEAN_LOGITS,
    SUM_SQ,
    SUM_X,
    TOTAL,
)
from trl_fast.ops.head.sweep import finish_scores, new_state

pytestmark = pytest.mark.gpu_code

EVERYTHING = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1
TRANSFORMS = {"plain": (1.0, 0.0, 1.0), "scaled": (0.5, 0.0, 1.25), "capped": (0.5, 30.0, 1.25)}


def test_structures_are_those_of_the_kernels(kernels):
    sizes = (ctypes.c_int64 * 3)()
    kernels.library.simt_argument_bytes(sizes)
    assert list(sizes) == [ctypes.sizeof(kind) for kind in (ScoreArgs, GradArgs, PackedRows)]


def make_rows(dtype: torch.dtype, columns: int, bias: bool, misplaced: int = 0):
    """Seven rows that break kernels, with a stride and a start that are no multiples of 16 bytes; targets, bias."""
    generator = torch.Generator().manual_seed(columns)
    storage = (4 * torch.randn(7, columns + 3, generator=generator)).to(dtype)
    logits = storage[:, misplaced : misplaced + columns]
    logits[1] += 1e4 if dtype != torch.float16 else 1e3
    logits[2, 1::2] = float("-inf")
    logits[3] = 1.5
    logits[4] = float("-inf")
    logits[5, columns // 2] = float("nan")
    targets = torch.randint(0, columns, (7,), generator=generator)
    targets[6] = columns + 5
    return logits, targets, torch.randn(columns, generator=generator) if bias else None


def statistics(kernel, logits, targets, bias, constants, outputs=EVERYTHING, tiles=1):
    """Returns a kernel's statistics of the rows, given in tiles."""
    state, columns = new_state(len(logits), logits.device), logits.shape[1]
    width = -(-columns // tiles)
    for start in range(0, columns, width):
        part = slice(start, min(start + width, columns))
        tile_bias = None if bias is None else bias[part]
        kernel(logits[:, part], targets, tile_bias, *constants, outputs, start, state)
    return finish_scores(state, outputs, columns, torch.promote_types(logits.dtype, torch.float32))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores(kernels, dtype, bias, transform):
    constants = TRANSFORMS[transform]
    for columns, misplaced in ((1, 0), (3, 1), (8, 0), (2047, 1), (2056, 0), (4099, 2)):
        logits, targets, bias_row = make_rows(dtype, columns, bias, misplaced)
        exact_bias = None if bias_row is None else bias_row.double()
        exact = statistics(row_scores_reference, logits.double(), targets, exact_bias, constants)
        baseline = statistics(row_scores_reference, logits, targets, bias_row, constants)
        for tiles in (1, 3):
            got = statistics(kernels.scores, logits, targets, bias_row, constants, EVERYTHING, tiles)
            # The low part is NaN where the target never came.
            lse, baseline_lse = (s[0].double() + s[6].nan_to_num() for s in (got, baseline))
            assert_as_good_as(baseline_lse[:, None], lse[:, None], exact[0][:, None], floor=5e-7)
            one_each = (s[1:6].reshape(-1, 1) for s in (baseline, got, exact))
            assert_as_good_as(*one_each, floor=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad(kernels, dtype, bias, transform):
    constants = TRANSFORMS[transform]
    for columns, misplaced in ((1, 0), (3, 1), (8, 0), (2047, 1), (4099, 2)):
        logits, targets, bias_row = make_rows(dtype, columns, bias, misplaced)
        lse = statistics(row_scores_reference, logits, targets, bias_row, constants)[0].contiguous()
        coefficients = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        coefficients[1, ::3] = 0
        in_float64 = (logits.double(), targets, None if bias_row is None else bias_row.double(), *constants)
        exact = torch.full_like(logits, float("nan"), dtype=torch.float64)
        row_grad_reference(*in_float64, lse.double(), coefficients.double(), 0, exact)
        baseline = torch.full_like(logits, float("nan"))
        row_grad_reference(logits, targets, bias_row, *constants, lse, coefficients, 0, baseline)
        other = torch.full((7, columns + 1), float("nan"), dtype=dtype)[:, 1:]  # at other boundaries than the logits
        same = make_rows(dtype, columns, bias, misplaced)[0]
        for given, out in ((logits, other), (same, same)):
            kernels.grad(given, targets, bias_row, *constants, lse, coefficients, 0, out)
            assert_as_good_as(baseline, out, exact, floor=1e-6)


@pytest.mark.parametrize("misplaced", range(5))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_gradient_of_float32_logits(kernels, dtype, misplaced):
    """The float32 gradient, rounded once, wherever its rows start."""
    for columns in (1, 3, 2056, 4099):
        logits, targets, bias = make_rows(torch.float32, columns, True, misplaced % 4)
        logits[5] = 0.0
        lse, coefficients = torch.full((7,), 9.0), torch.ones(4, 7)
        unrounded = torch.full_like(logits, float("nan"))
        out = torch.full((7, columns + 4), float("nan"), dtype=dtype)[:, misplaced:][:, :columns]
        for to in (unrounded, out):
            kernels.grad(logits, targets, bias, *TRANSFORMS["plain"], lse, coefficients, 0, to)
        assert torch.equal(out, unrounded.to(dtype))


def test_exponentials_and_tanh(kernels):
    check_exponential(kernels)
    # Their 1 − tanh² loses digits near the cap: another form takes registers from every softcap kernel.
    check_tanh(kernels, largest=1.0)


def test_a_tile_changes_only_what_was_asked_for(kernels):
    logits, targets, _ = make_rows(torch.float32, 37, bias=False)
    rows_of = {ENTROPY: SUM_X, LOG_SUM_SQ_PROBS: SUM_SQ, MEAN_LOGITS: TOTAL, IS_TOP1: BEFORE}
    for outputs in range(EVERYTHING + 1):
        expected, got = (new_state(7, logits.device) for _ in range(2))
        for kernel, state in ((row_scores_reference, expected), (kernels.scores, got)):
            kernel(logits, targets, None, *TRANSFORMS["plain"], outputs, 0, state)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        untouched = [row for bit, row in rows_of.items() if not outputs & bit]
        assert torch.equal(got[untouched], new_state(7, logits.device)[untouched])


def test_a_gradient_in_tiles(kernels):
    logits, targets, _ = make_rows(torch.bfloat16, 3001, bias=False)
    lse, coefficients = torch.zeros(7), torch.ones(4, 7)
    whole, parts = (torch.full_like(logits, float("nan")) for _ in range(2))
    kernels.grad(logits, targets, None, *TRANSFORMS["plain"], lse, coefficients, 0, whole)
    for start, stop in ((0, 1003), (1003, 3001)):
        tile = logits[:, start:stop]
        kernels.grad(tile, targets, None, *TRANSFORMS["plain"], lse, coefficients, start, parts[:, start:stop])
    assert torch.equal(whole.nan_to_num(nan=7.0), parts.nan_to_num(nan=7.0))


def test_empty_tiles_change_nothing(kernels):
    for rows, columns in ((0, 5), (3, 0)):
        logits, targets = torch.empty(rows, columns), torch.zeros(rows, dtype=torch.int64)
        state = new_state(rows, logits.device)
        kernels.scores(logits, targets, None, *TRANSFORMS["plain"], EVERYTHING, 0, state)
        torch.testing.assert_close(state, new_state(rows, logits.device), equal_nan=True)
        kernels.grad(logits, targets, None, *TRANSFORMS["plain"], torch.zeros(rows), torch.ones(4, rows), 0, logits)


def test_offsets_beyond_32_bits(kernels):
    """Three rows, 2³⁰ elements apart; only the pages that are touched take memory."""
    stride, columns = 2**30, 40
    logits = torch.empty(2 * stride + columns, dtype=torch.bfloat16).as_strided((3, columns), (stride, 1))
    logits.copy_(torch.randn(3, columns, generator=torch.Generator().manual_seed(0)))
    targets, constants = torch.tensor([0, 7, 39]), TRANSFORMS["plain"]
    expected = statistics(row_scores_reference, logits, targets, None, constants)
    torch.testing.assert_close(statistics(kernels.scores, logits, targets, None, constants), expected)
    lse, coefficients = expected[0].contiguous(), torch.tensor([-1.0, 0.0, 1.0, 0.0])[:, None].repeat(1, 3)
    wanted = torch.empty(3, columns, dtype=torch.bfloat16)
    row_grad_reference(logits, targets, None, *constants, lse, coefficients, 0, wanted)
    kernels.grad(logits, targets, None, *constants, lse, coefficients, 0, logits)
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_row(kernels, dtype):
    """A vocabulary of 256k: every thread adds up a thousand terms in float32."""
    logits = (3 * torch.randn(1, 2**18, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets, constants = torch.tensor([2**18 - 1]), TRANSFORMS["plain"]
    exact = statistics(row_scores_reference, logits.double(), targets, None, constants)
    got = statistics(kernels.scores, logits, targets, None, constants)
    torch.testing.assert_close(got[:6].double(), exact[:6], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_compiled_kernels_do_not_spill_and_move_no_byte_twice(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    row_kernels = [k for k in compile_cuda_kernels(nvcc, target) if k.label.startswith(("row_scores", "row_grad"))]
    assert len(row_kernels) == 65
    for kernel in row_kernels:
        assert kernel.resources.spill_bytes == 0, kernel
        # A thread of row_scores has 16 or 32 bytes on their way: fewer of them will do.
        assert kernel.resources.occupancy >= (0.625 if "scores" in kernel.label else 0.75), kernel
        if "bias" not in kernel.label:
            assert kernel.resources.streamed_bytes == kernel.least_bytes, kernel


@pytest.mark.slow
def test_no_races_and_a_missing_barrier_is_found(compile_host):
    clean = run_sanitized(compile_host("row_kernels_sanitized.cpp", "-fsanitize=thread"), "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    plant = "-DTRL_FAST_PLANT_MISSING_BARRIER"
    broken = run_sanitized(compile_host("row_kernels_sanitized.cpp", "-fsanitize=thread", plant), "clean")
    assert broken.returncode != 0
    assert "data race" in broken.stderr, broken.stderr[:4000]
    assert "merged_block" in broken.stderr and "block_maximum" in broken.stderr


def test_no_access_out_of_bounds_and_planted_ones_are_found(compile_host):
    flags = ("-fsanitize=address", "-fsanitize-sections=simt_shared")
    program = compile_host("row_kernels_sanitized.cpp", *flags)
    clean = run_sanitized(program, "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    planted = {
        "reads-behind-the-row": "heap-buffer-overflow.*READ.*row_scores_kernel",
        "writes-behind-the-row": "heap-buffer-overflow.*WRITE.*row_grad_kernel",
        "writes-words-behind-the-row": "heap-buffer-overflow.*WRITE.*row_scores_packed_kernel",
        "writes-behind-shared-memory": "global-buffer-overflow.*WRITE.*write_shared",
        "divergent-barrier": "simt: deadlock in block .* 128 threads wait at __syncthreads",
    }
    for what, report in planted.items():
        broken = run_sanitized(program, what)
        assert broken.returncode != 0
        assert re.search(report, broken.stderr, re.DOTALL), broken.stderr[:4000]
    assert run_sanitized(program, "reads-unwritten-shared-memory").returncode == 0
