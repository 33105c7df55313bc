"""Products of our own on the CPU: against float64 and torch.mm in every layout, and what their bits depend on."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.instruction_sets import CPU_FLAGS, check_instruction_set
from trl_fast.ops.backends import load_extension
from trl_fast.ops.device import OWN_PRODUCTS, device_facts, simulated_device
from trl_fast.ops.matmul import add_mm, mm_into, own_product_serves

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, columns, steps: no, one, odd and whole tiles, and more than one block of each.
SHAPES = [(0, 5, 7), (5, 0, 7), (5, 7, 0), (1, 1, 1), (1, 33, 300), (14, 32, 16), (15, 31, 17), (29, 300, 513)]
SHAPES += [(700, 65, 600), (30, 19, 2000), (1, 257, 40), (33, 40, 24)]
# How a factor lies: in rows, in columns, in rows with gaps, with gaps everywhere.
LAYOUTS = ("rows", "columns", "gaps", "strided")


@pytest.fixture(autouse=True)
def own_products():
    with simulated_device(replace(device_facts(CPU), own_products=True, multiplies_bf16=False)):
        yield


def laid_out(layout, rows, columns, seed, dtype=torch.float32):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "columns":
        return x.t().contiguous().t()
    step = {"rows": (1, 0), "gaps": (1, 3), "strided": (2, 1)}[layout]
    room = torch.full((rows, columns * step[0] + step[1]), float("nan"), dtype=dtype)
    part = room[:, : columns * step[0] : step[0]]
    return part.copy_(x)


def mm_of_torch(left, right):
    """Computes torch.mm; a row alone, which MKL sums up in finer parts, among others: ours has the same bits there."""
    return torch.mm(left.repeat(64, 1), right)[:1] if left.shape[0] == 1 else torch.mm(left, right)


def check_product(shape, layouts, dtypes=(torch.float32,) * 3, adds=False):
    """The result is as near to that of float64 as torch.mm's (twice its error), or rounded once from as near a sum."""
    rows, columns, steps = shape
    left = laid_out(layouts[0], rows, steps, 0, dtypes[0])
    right = laid_out(layouts[1], steps, columns, 1, dtypes[1])
    out = laid_out(layouts[2], rows, columns, 2, dtypes[2])
    exact = left.double() @ right.double() + (out.double() if adds else 0)
    plain = mm_of_torch(left.float(), right.float()) + (out.float() if adds else 0)
    if adds:
        add_mm(out, left, right)
    else:
        assert mm_into(out.fill_(float("nan")), left, right) is out
    if not out.numel():
        return
    rounding = 0 if dtypes[2] == torch.float32 else torch.finfo(dtypes[2]).eps / 2 * exact.abs()
    errors, errors_of_torch = (out.double() - exact).abs() - rounding, plain.double() - exact
    one_rounding = torch.finfo(torch.float32).eps / 2 * exact.square().mean().sqrt()
    allowed = 2 * errors_of_torch.square().mean().sqrt() + one_rounding
    assert errors.clamp(min=0).square().mean().sqrt() <= allowed
    # A few numbers may have no error in torch by luck.
    assert errors.max() <= 6 * allowed


def check_widened_sum(dtype, shape, gap=0):
    """Sums in float32 have the bits of PyTorch's; what is beside them stays."""
    part = laid_out("gaps", *shape, 0, dtype)
    room = torch.randn(shape[0], shape[1] + gap, generator=torch.Generator().manual_seed(1))
    total, expected = room[:, : shape[1]], room.clone()
    expected[:, : shape[1]].add_(part)
    torch.ops.trl_fast.add_widened(part, total)
    assert torch.equal(room, expected)


def check_all():
    assert load_extension().ok
    for dtype, rows, columns in itertools.product(DTYPES, (0, 1, 37), (0, 1, 15, 64, 901)):
        check_widened_sum(dtype, (rows, columns), gap=3)
    with simulated_device(replace(device_facts(CPU), own_products=True, multiplies_bf16=False)):
        for shape, *layouts in itertools.product(SHAPES, LAYOUTS, LAYOUTS, LAYOUTS[:3]):
            check_product(shape, layouts, adds=shape[0] % 2 == 1)
        for dtypes in itertools.product(DTYPES, repeat=3):
            for shape, adds in itertools.product(SHAPES, (False, True)):
                check_product(shape, ("rows", "columns", "gaps"), dtypes, adds)
                check_product(shape, ("columns", "gaps", "rows"), dtypes, adds)


@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set(isa):
    check_instruction_set(isa, check_all)


def test_a_library_s_products_are_added_without_a_copy():
    class Operators(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (func.name(),)
            return func(*args, **(kwargs or {}))

    left, right = laid_out("rows", 40, 30, 0, torch.bfloat16), laid_out("rows", 30, 50, 1, torch.bfloat16)
    total, before = torch.ones(40, 50), torch.ones(40, 50)
    with simulated_device(replace(device_facts(CPU), multiplies_bf16=True)), Operators() as operators:
        add_mm(total, left, right)
    assert operators.names == ("aten::mm", "trl_fast::add_widened")
    assert torch.equal(total, before.add_(torch.mm(left, right)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_library_s_products_are_added_to_sums_of_other_dtypes(dtype):
    left, right = laid_out("rows", 4, 6, 0, torch.bfloat16), laid_out("rows", 6, 5, 1, torch.bfloat16)
    total = torch.ones(4, 5, dtype=dtype)
    with simulated_device(replace(device_facts(CPU), own_products=False)):
        add_mm(total, left, right)
    assert torch.equal(total, torch.ones(4, 5, dtype=dtype).add_(torch.mm(left, right)))


def test_bad_sums_are_refused():
    part = torch.zeros(4, 6)
    for total in (torch.zeros(4, 5), torch.zeros(4, 6).half(), torch.zeros(6, 4).t(), torch.zeros(6)):
        with pytest.raises(ValueError, match="total: "):
            torch.ops.trl_fast.add_widened(part, total)


def test_sums_are_added_in_the_result():
    check_product((29, 300, 513), ("rows", "rows", "rows"), adds=True)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_goes_where_it_does_in_torch(value):
    left, right = laid_out("rows", 17, 40, 0), laid_out("columns", 40, 35, 1)
    left[3, 7] = right[20, 34] = value
    out = mm_into(torch.empty(17, 35), left, right)
    plain = torch.mm(left, right)
    assert torch.equal(out.isnan(), plain.isnan()) and torch.equal(out.isinf(), plain.isinf())
    assert out.isfinite().sum() == 16 * 34


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_shape_around_them(dtype):
    """A row scored alone, or in another batch or tile of the vocabulary, has the same logits."""
    left, right = laid_out("rows", 300, 700, 0, dtype), laid_out("columns", 700, 290, 1, dtype)
    whole = mm_into(torch.empty(300, 290, dtype=dtype), left, right)
    for rows, columns in (
        (slice(5, 6), slice(0, 290)),
        (slice(13, 250), slice(7, 41)),
        (slice(0, 300), slice(33, 34)),
    ):
        part = torch.empty(whole[rows, columns].shape, dtype=dtype)
        assert torch.equal(mm_into(part, left[rows], right[:, columns]), whole[rows, columns])
    turned = mm_into(torch.empty(290, 300, dtype=dtype).t(), left.contiguous(), right.contiguous())
    assert torch.equal(turned, whole)


# Threads share columns; rows are packed in two chunks; threads take bands of rows.
@pytest.mark.parametrize("rows, columns, steps", [(333, 450, 900), (600, 100, 4000), (3000, 24, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(rows, columns, steps, dtype):
    left, right = laid_out("rows", rows, steps, 0, dtype), laid_out("rows", steps, columns, 1, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(mm_into(torch.full((rows, columns), float("nan"), dtype=dtype), left, right))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])
    exact = left.double() @ right.double()
    assert (results[0].double() - exact).norm() <= max(1e-5, torch.finfo(dtype).eps) * exact.norm()


def test_what_is_beside_the_result_stays():
    room = torch.full((40, 100), 7.0)
    mm_into(room[3:34, 5:70], laid_out("rows", 31, 20, 0), laid_out("rows", 20, 65, 1))
    inside = torch.zeros(40, 100, dtype=torch.bool)
    inside[3:34, 5:70] = True
    assert (room[~inside] == 7).all() and (room[inside] != 7).all()


def test_bad_factors_are_refused():
    product = torch.ops.trl_fast.product
    x = torch.zeros(4, 6)
    for left, right, out, name in (
        (x, x, torch.zeros(4, 6), "right"),
        (x, x.t(), torch.zeros(4, 5), "out"),
        (x, x.t(), torch.zeros(8, 8)[::2, ::2], "out"),
        (x.double(), x.t(), torch.zeros(4, 4), "left"),
        (x[0], x.t(), torch.zeros(4, 4), "left"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            product(left, right, out, False)


def test_where_they_serve():
    x, doubles = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.float64)
    assert own_product_serves(x, x, x) and not own_product_serves(doubles, doubles, doubles)
    assert not own_product_serves(torch.zeros(8, 12)[::2, ::2], x, x)
    assert not own_product_serves(x.to("meta"), x, x)
    with simulated_device(replace(device_facts(CPU), multiplies_bf16=True)):
        assert not own_product_serves(x, x.bfloat16(), x) and own_product_serves(x, x.half(), x)
    with simulated_device(replace(device_facts(CPU), own_products=False)):
        assert not own_product_serves(x, x, x)


@pytest.mark.parametrize("value, expected", [("1", "True"), ("0", "False"), ("yes", "ValueError: TRL_FAST_OWN")])
def test_the_environment_decides(value, expected):
    program = (
        "import torch; from trl_fast.ops.device import device_facts as f; print(f(torch.device('cpu')).own_products)"
    )
    environment = {**os.environ, OWN_PRODUCTS: value, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert expected in result.stdout + result.stderr
