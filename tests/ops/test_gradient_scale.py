"""Tests the product of a gradient and a number in place: the same bits as PyTorch's, by kernel and without."""

import pytest
import torch

from benchmarks.kernel_report import SCALE_KERNELS, compile_kernel, resources
from support.triton_interpreter import Memory, interpreted_kernels
from trl_fast.kernels import gradient_scale as kernel
from trl_fast.ops.gradient_scale import scale_in_place

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0,), (1,), (3, 7), (2, kernel.BLOCK + 5))


def problem(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.gpu_code
@pytest.mark.parametrize("factor", [1.0, 0.3, -2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_gives_pytorchs_bits(shape, dtype, factor, monkeypatch):
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", 2)  # so that a program makes several trips
    gradient, number = problem(shape, dtype), torch.tensor(factor)
    wanted = gradient * number.to(dtype)
    with interpreted_kernels():
        assert scale_in_place(gradient, number) is gradient
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu_code
def test_nothing_is_read_where_the_number_is_one(monkeypatch):
    accesses = []
    monkeypatch.setattr(Memory, "check", lambda self, pointers, mask, itemsize, what: accesses.append(what))
    gradient = problem((3, 7), torch.float32)
    with interpreted_kernels():
        scale_in_place(gradient, torch.tensor(1.0))
        assert accesses == ["load"]
        scale_in_place(gradient, torch.tensor(2.0))
    assert accesses == ["load", "load", "load", "store"]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_without_a_kernel(dtype):
    gradient = problem((4, 6), dtype).t()
    wanted = gradient * 0.5
    assert torch.equal(scale_in_place(gradient, torch.tensor(0.5)), wanted)


@pytest.mark.parametrize("factor, products", [(1.0, 0), (0.5, 1)])
def test_without_a_kernel_there_is_no_product_with_one(factor, products):
    gradient = problem((4, 6), torch.float32)
    wanted = gradient * factor
    with torch.profiler.profile() as profile:
        scale_in_place(gradient, torch.tensor(factor))
    assert sum(event.name == "aten::mul_" for event in profile.events()) == products
    assert torch.equal(gradient, wanted)


def test_the_op_passes_opcheck():
    torch.library.opcheck(torch.ops.trl_fast.gradient_scale, (problem((3, 7), torch.float32), torch.tensor(2.0)))


@pytest.mark.gpu_code
@pytest.mark.parametrize("target", [80, 90, 100])
def test_compiles_to_wide_accesses(target):
    for case in SCALE_KERNELS:
        found = resources(compile_kernel(case, target), case.num_warps, target)
        assert found.spill_bytes == 0 and found.narrow_stores == 0 and found.vector_loads
