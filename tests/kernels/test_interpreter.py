"""Tests that the repaired interpreter finds what the stock one hides, and leaves Triton as it was."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from benchmarks.kernel_report import KernelCase, compile_kernel
from support.triton_interpreter import bf16_to_float, float_to_bf16, interpreted, interpreter_repaired

pytestmark = pytest.mark.gpu_code


@triton.jit
def multiply_add(x, y, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = columns < n
    a = tl.load(x + columns, mask=mask, other=0.0)
    b = tl.load(y + columns, mask=mask, other=0.0)
    tl.store(out + columns, a * b + a, mask=mask)


@triton.jit
def compare_and_cast(x, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    a = tl.load(x + columns)
    tl.store(out + columns, tl.where(a > 0.5, a.to(tl.float32), tl.maximum(a, -a).to(tl.float32)))


@triton.jit
def careless_sum(x, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + columns, mask=columns < n), 0))


@triton.jit
def out_of_bounds(x, out, n, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, tl.load(x + columns))


@triton.jit
def previous_plus_one(x, out, n, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    tl.store(out + index + 1, tl.load(out + index) + 1.0)


def run(kernel, *arguments, grid=(1,), block=16, **options):
    with interpreter_repaired(**options):
        interpreted(kernel)[grid](*arguments, BLOCK=block)


def test_bf16_rounds_to_nearest_even():
    values = torch.randn(10_000) * torch.logspace(-30, 30, 10_000)
    bits = float_to_bf16(values.numpy())
    assert torch.equal(torch.from_numpy(bf16_to_float(bits)), values.bfloat16().float())


def test_bf16_arithmetic_is_done_on_values():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, generator=generator).bfloat16() for _ in range(2))
    out = torch.full_like(x, float("nan"))
    run(multiply_add, x, y, out, 16)
    torch.testing.assert_close(out, (x * y + x), rtol=2**-7, atol=0)
    result = torch.full((16,), float("nan"))
    run(compare_and_cast, x, result, 16)
    assert torch.equal(result, torch.where(x > 0.5, x, x.abs()).float())


def test_masked_lanes_are_poison():
    out = torch.zeros(1)
    run(careless_sum, torch.ones(16), out, 7)
    assert out.isnan()
    run(careless_sum, torch.ones(16), out, 7, poison_and_bounds=False)
    assert out.item() == 7


def test_an_access_out_of_bounds_names_the_argument():
    with pytest.raises(InterpreterError, match="load out of bounds in 6 lanes.*'x'"):
        run(out_of_bounds, torch.ones(10), torch.ones(16), 16)
    with pytest.raises(InterpreterError, match="store out of bounds in 1 lanes.*'out'"):
        run(out_of_bounds, torch.ones(16), torch.ones(15), 16)


def test_programs_run_in_another_order():
    out = torch.zeros(9)
    run(previous_plus_one, out, out, 8, grid=(8,), shuffle=None)
    assert out.tolist() == list(range(9))
    out.zero_()
    run(previous_plus_one, out, out, 8, grid=(8,))
    assert out.tolist() != list(range(9))


def test_triton_compiles_as_before_afterwards():
    run(multiply_add, *(torch.ones(16) for _ in range(3)), 16)
    assert not triton.knobs.runtime.interpret
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32"}
    case = KernelCase("multiply_add", multiply_add, signature, {"BLOCK": 16}, num_warps=4, scalar_loads=0)
    assert compile_kernel(case, 90).asm["cubin"]
