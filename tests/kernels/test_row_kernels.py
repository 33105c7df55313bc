"""Tests the Triton row kernels: offsets beyond 32 bits, and their machine code for GPUs that are not here."""

import pytest
import torch

from benchmarks.kernel_report import HEAD_KERNELS, compile_kernel, resources
from support.elementary_functions import check_exponential, check_tanh
from support.packed_rows import (
    COLUMNS,
    PLAIN,
    TRANSFORMED,
    check_empty,
    check_packing,
    pack_hard_rows,
)
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import row_kernels
from trl_fast.ops.head.kept_logits import CHUNK
from trl_fast.ops.head.row_kernels import RowKernels, row_grad_reference, row_scores_reference
from trl_fast.ops.head.row_statistics import ENTROPY, SUM, TOP
from trl_fast.ops.head.sweep import new_state

pytestmark = pytest.mark.gpu_code

PACKING = RowKernels(
    scores=row_kernels.row_scores,
    grad=row_kernels.row_grad,
    bytes_per_element=0,
    scores_packed=row_kernels.row_scores_packed,
    grad_packed=row_kernels.row_grad_packed,
)


def test_offsets_beyond_32_bits():
    """Three rows, 2³⁰ elements apart; only the pages that are touched take memory."""
    stride, columns = 2**30, 40
    storage = torch.empty(2 * stride + columns, dtype=torch.bfloat16)
    logits = storage.as_strided((3, columns), (stride, 1))
    logits.copy_(torch.randn(3, columns, generator=torch.Generator().manual_seed(0)))
    targets, constants = torch.tensor([0, 7, 39]), (None, 1.0, 0.0, 1.0)
    expected, got = new_state(3, storage.device), new_state(3, storage.device)
    row_scores_reference(logits, targets, *constants, 0, 0, expected)
    lse = (expected[TOP] + expected[SUM].log()).float()
    with interpreted_kernels():
        row_kernels.row_scores(logits, targets, *constants, 0, 0, got)
        torch.testing.assert_close(got, expected)
        wanted = torch.empty(3, columns, dtype=torch.bfloat16)
        coefficients = torch.tensor([-1.0, 0.0, 1.0, 0.0])[:, None].expand(4, 3).contiguous()
        row_grad_reference(logits, targets, *constants, lse, coefficients, 0, wanted)
        row_kernels.row_grad(logits, targets, *constants, lse, coefficients, 0, logits)
        torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMED], ids=["plain", "transformed"])
@pytest.mark.parametrize(
    "columns", [pytest.param(c, marks=() if c in (5, 2049, 4104) else pytest.mark.slow) for c in COLUMNS]
)
def test_packing(columns, transform):
    with interpreted_kernels():
        check_packing(PACKING, columns, transform)


def test_packing_of_some_outputs_and_at_other_boundaries():
    with interpreted_kernels():
        for outputs in (0, ENTROPY):
            pack_hard_rows(PACKING, 2056, TRANSFORMED, misplaced=1, outputs=outputs)


def test_exponentials_and_tanh():
    with interpreted_kernels():
        check_exponential(PACKING)
        check_tanh(PACKING)


def test_packing_of_empty_tiles():
    with interpreted_kernels():
        check_empty(PACKING)


def test_the_chunks_of_the_format():
    assert row_kernels.CHUNK == CHUNK


def test_packed_offsets_beyond_32_bits():
    """Three rows, 2³¹ words apart; only the pages that are touched take memory."""
    columns, stride = 40, 2**31
    words = torch.empty(2 * stride + columns, dtype=torch.int16).as_strided((3, columns), (stride, 1))
    logits, targets = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 7, 39])
    tops, state = torch.empty(3, 1), new_state(3, logits.device)
    with interpreted_kernels():
        row_kernels.row_scores_packed(logits, targets, None, 1.0, 1.0, 0, 0, state, words, tops)
        lse = (state[TOP] + state[SUM].log()).float()
        coefficients = torch.tensor([-1.0, 0.0, 1.0, 0.0])[:, None].expand(4, 3).contiguous()
        wanted, out = torch.empty(3, columns), words.view(torch.float16)
        row_grad_reference(logits, targets, None, 1.0, 0.0, 1.0, lse, coefficients, 0, wanted)
        row_kernels.row_grad_packed(words, None, targets, 1.0, 1.0, lse, coefficients, 0, out, tops)
    torch.testing.assert_close(out.float(), wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "target"),
    [
        # What differs in float16 are names of instructions.
        pytest.param(kernel, target, marks=pytest.mark.slow if "fp16" in kernel.label else ())
        for kernel in HEAD_KERNELS
        if kernel.label.startswith("row_")
        for target in kernel.targets
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_kernels_compile_without_spills_and_read_sixteen_bytes_at_once(kernel, target):
    found = resources(compile_kernel(kernel, target), kernel.num_warps, target)
    assert found.spill_bytes == 0
    assert found.vector_loads > 0 and found.narrow_loads <= kernel.scalar_loads, found
    assert found.registers * 32 * kernel.num_warps <= 65536
