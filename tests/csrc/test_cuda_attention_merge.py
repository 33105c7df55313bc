"""Tests the CUDA kernel that merges attention, compiled as host C++: against PyTorch and float64, and sanitized."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from benchmarks.compiled_cuda_kernels import compile_cuda_kernels, find_nvcc
from support.host_kernels import DTYPES, run_sanitized
from support.merging import INF, Parts, assert_merged, assert_nan_stays
from support.targets import QUICK_TARGETS
from trl_fast.ops.attention_merge import _merge_reference

pytestmark = pytest.mark.gpu_code


class AttentionOutput(ctypes.Structure):
    """Mirrors trl_fast::AttentionOutput; the structures here are those of csrc/cuda/attention_merge.h."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("lse_stride", ctypes.c_int64),
    ]


class AttentionMergeArgs(ctypes.Structure):
    _fields_ = [
        ("first", AttentionOutput),
        ("second", AttentionOutput),
        ("place", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("tokens", "heads", "width")),
        ("merged", ctypes.c_void_p),
        ("merged_lse", ctypes.c_void_p),
    ]


class HostMerge:
    """The kernel's simulation, with the op's signature; each call shuffles the threads anew."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.calls = 0

    def __call__(self, out, lse, other, other_lse, place) -> tuple[torch.Tensor, torch.Tensor]:
        merged = torch.full(out.shape, float("nan"), dtype=out.dtype)
        merged_lse = torch.full(lse.shape, float("nan"))
        first, second = (
            AttentionOutput(x.data_ptr(), x.stride(0), x.stride(1), sums.data_ptr(), sums.stride(0))
            for x, sums in ((out, lse), (other, other_lse))
        )
        to = (merged.data_ptr(), merged_lse.data_ptr())
        args = AttentionMergeArgs(first, second, place.data_ptr(), DTYPES[out.dtype], *out.shape, *to)
        self.calls += 1
        self.library.simt_attention_merge(ctypes.byref(args), ctypes.c_uint(self.calls))
        return merged, merged_lse


@pytest.fixture(scope="module")
def merge(compile_host) -> HostMerge:
    return HostMerge(compile_host("attention_merge_simt.cpp", "-shared", "-fPIC"))


def test_structures_are_those_of_the_kernel(merge):
    merge.library.simt_attention_merge_bytes.restype = ctypes.c_int64
    assert merge.library.simt_attention_merge_bytes() == ctypes.sizeof(AttentionMergeArgs)


# Rows of packs, of which a block has some or a part of one; and rows that are none.
SHAPES = [(1, 1, 8), (33, 3, 128), (70, 2, 96), (9, 2, 256), (3, 1, 2600), (7, 3, 1), (40, 1, 17), (6, 2, 1100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merged_as_in_float64(merge, shape, dtype):
    parts = Parts(*shape, dtype)
    assert_merged(parts, *merge(*parts.given()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_begin_anywhere(merge, dtype):
    """Whole packs that lie one number behind a multiple of sixteen bytes, in each of the tensors."""
    for name in ("out", "other"):
        parts = Parts(40, 3, 64, dtype)
        given = getattr(parts, name)
        room = torch.empty(given.shape[0], given.shape[1], 72, dtype=dtype)[..., 1:65]
        setattr(parts, name, room.copy_(given))
        assert_merged(parts, *merge(*parts.given()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 13])
def test_the_bits_are_pytorchs_where_the_share_is_known(merge, width, dtype):
    """Exponentials of 0 and of huge numbers are the same wherever they are computed."""
    parts = Parts(41, 2, width, dtype)
    chosen = parts.place >= 0
    generator = torch.Generator().manual_seed(1)
    apart = torch.tensor([0.0, 0.0, 200.0, -200.0, INF, -INF])[
        torch.randint(6, parts.lse[:, chosen].shape, generator=generator)
    ]
    parts.other_lse[:, parts.place[chosen].long()] = parts.lse[:, chosen] + apart
    wanted, wanted_lse = _merge_reference(*parts.given())
    merged, lse = merge(*parts.given())
    torch.testing.assert_close(merged, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse[:, ~chosen], wanted_lse[:, ~chosen], rtol=0, atol=0)
    torch.testing.assert_close(lse, wanted_lse, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_as_pytorch_rounds(merge, dtype):
    """One exponential, sigmoid and interpolation in float32, and one rounding to the dtype: number by number."""
    libm = ctypes.CDLL("libm.so.6")
    for name, arguments in (("expf", 1), ("fmaf", 3)):
        getattr(libm, name).restype, getattr(libm, name).argtypes = ctypes.c_float, [ctypes.c_float] * arguments
    parts = Parts(23, 2, 24, dtype)
    merged, _ = merge(*parts.given())
    for token, row in enumerate(parts.place.tolist()):
        for head in range(2) if row >= 0 else ():
            a, b = parts.lse[head, token], parts.other_lse[head, row]
            if -INF in (a, b):
                continue
            share = 1 / (1 + torch.tensor(libm.expf((a - b).item())))
            x, y = parts.out[token, head].float(), parts.other[row, head].float()
            factor, base = (share, x) if share < 0.5 else (share - 1, y)
            wanted = [libm.fmaf(factor.item(), *pair) for pair in zip((y - x).tolist(), base.tolist(), strict=True)]
            assert torch.equal(merged[token, head], torch.tensor(wanted).to(dtype)), (token, head)


@pytest.mark.parametrize("width", [64, 13])
def test_no_token_no_head_and_no_second_part(merge, width):
    parts = Parts(7, 2, width, torch.bfloat16)
    parts.place, parts.other, parts.other_lse = torch.full_like(parts.place, -1), parts.other[:0], torch.empty(2, 0)
    parts.lse[0, 2], parts.out[2] = -INF, 3.0
    merged, lse = merge(*parts.given())
    torch.testing.assert_close(merged, parts.out, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(lse, parts.lse)
    for tokens, heads in ((0, 2), (7, 0)):
        empty = Parts(tokens, 1, width, torch.bfloat16).given()
        merge(*(x[:, :heads] for x in empty[:1]), empty[1][:heads], empty[2][:, :heads], empty[3][:heads], empty[4])
    merged, lse = merge(*(x[..., :0] if x.dim() == 3 else x for x in Parts(7, 2, 8, torch.float32).given()))
    assert merged.shape == (7, 2, 0) and not lse.isnan().any()


def test_a_nan_stays_in_its_token(merge):
    assert_nan_stays(merge)


def test_offsets_beyond_32_bits(merge):
    """The last of the tokens lies 2³¹ elements behind the first; only the pages that are touched take memory."""
    for name in ("out", "other"):
        parts = Parts(3, 1, 64, torch.bfloat16)
        given = getattr(parts, name)
        stride = 2**31 // (len(given) - 1)
        far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided(given.shape, (stride, 64, 1))
        setattr(parts, name, far.copy_(given))
        assert_merged(parts, *merge(*parts.given()))


@pytest.mark.parametrize("target", QUICK_TARGETS)
def test_compiled_kernels_do_not_spill_and_move_no_byte_twice(target):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    found = list(compile_cuda_kernels(nvcc, target, "attention_merge.cu"))
    assert len({kernel.label for kernel in found}) == len(found) == 6
    for kernel in found:
        assert kernel.resources.spill_bytes == 0 and kernel.resources.occupancy >= 0.5, kernel
        if kernel.shown:
            accesses = kernel.resources
            # Of two tokens: outputs, a place and log-sum-exps.
            assert (accesses.vector_loads, accesses.narrow_loads) == (4, 6), kernel
            assert (accesses.vector_stores, accesses.narrow_stores) == (2, 2), kernel
            assert accesses.streamed_bytes == kernel.least_bytes, kernel


def test_no_access_out_of_bounds_or_misaligned_and_planted_ones_are_found(compile_host):
    """Sixteen bytes are read at multiples of sixteen only."""
    flags = ("-fsanitize=address", "-fsanitize=alignment", "-fno-sanitize-recover=alignment")
    program = compile_host("attention_merge_sanitized.cpp", *flags)
    clean = run_sanitized(program, "clean")
    assert clean.returncode == 0 and "finished" in clean.stdout, clean.stderr[:4000]
    for what in ("token", "place", "width"):
        broken = run_sanitized(program, what)
        assert broken.returncode != 0 and "heap-buffer-overflow" in broken.stderr, broken.stderr[:4000]
