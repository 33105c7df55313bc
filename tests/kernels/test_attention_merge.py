"""Tests the Triton kernel that merges attention: in the interpreter, and what it compiles to."""

import pytest
import torch

from benchmarks.kernel_report import MERGE_KERNELS, compile_kernel, resources
from support.merging import Parts, assert_merged, assert_nan_stays
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import attention_merge
from trl_fast.ops.attention_merge import merge_attention

pytestmark = pytest.mark.gpu_code


def merge(*given):
    merged = torch.full(given[0].shape, float("nan"), dtype=given[0].dtype)
    lse = torch.full(given[1].shape, float("nan"))
    with interpreted_kernels():
        attention_merge.merge(*given, merged, lse)
    return merged, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 64), (33, 3, 128), (9, 2, 96), (17, 1, 256)])
def test_merged_as_in_float64(tokens, heads, width, dtype):
    parts = Parts(tokens, heads, width, dtype)
    assert_merged(parts, *merge(*parts.given()))


def test_no_token_and_no_second_part():
    parts = Parts(7, 2, 64, torch.bfloat16)
    parts.place, parts.other, parts.other_lse = torch.full_like(parts.place, -1), parts.other[:0], torch.empty(2, 0)
    parts.out[1] = 0.0
    assert_merged(parts, *merge(*parts.given()))
    merge(*Parts(0, 2, 64, torch.bfloat16).given())


def test_offsets_beyond_32_bits():
    """Three tokens, 2³⁰ elements apart; only the pages that are touched take memory."""
    parts = Parts(3, 1, 64, torch.bfloat16)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 1, 64), (2**30, 64, 1))
    parts.out = far.copy_(parts.out)
    assert_merged(parts, *merge(*parts.given()))


def test_a_nan_stays_in_its_token():
    assert_nan_stays(merge)


def test_the_op_takes_the_kernel_where_it_serves(monkeypatch):
    parts, calls = Parts(7, 2, 64, torch.bfloat16), []
    real = attention_merge.merge
    monkeypatch.setattr(attention_merge, "merge", lambda *given: (calls.append(1), real(*given)))
    with interpreted_kernels():
        assert_merged(parts, *merge_attention(*parts.given()))
        monkeypatch.setenv("TRL_FAST_BACKEND", "torch")
        assert_merged(parts, *merge_attention(*parts.given()))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        pytest.param(kernel, target, marks=() if target == 90 else pytest.mark.slow)
        for kernel in MERGE_KERNELS
        for target in kernel.targets
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_compiles_without_spills_and_moves_no_byte_twice(kernel, target):
    found = resources(compile_kernel(kernel, target), kernel.num_warps, target, kernel.scalar_loads)
    assert found.spill_bytes == 0 and found.narrow_loads <= kernel.scalar_loads, found
    assert found.streamed_bytes == kernel.least_bytes, found
