"""Tests the Triton kernel of divergences: interpreted, against float64; and its machine code for GPUs not here."""

import pytest
import torch

from benchmarks.kernel_report import DIVERGENCE_KERNELS, compile_kernel, resources
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
from support.triton_interpreter import interpreted_kernels
from trl_fast.kernels import divergence_kernels
from trl_fast.kernels.divergence_kernels import row_divergence
from trl_fast.ops import linear_divergence, supports
from trl_fast.ops.backends import choose_backend
from trl_fast.ops.device import device_facts

pytestmark = [pytest.mark.gpu_code, pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")]
OUTPUTS = ("divergence", "entropy", "is_same_top1")
SLOW = ("jsd 0.1", "skewed forward KL")


@pytest.fixture
def interpreter(monkeypatch):
    """Rows of several blocks, in the interpreter: it takes as long for a block of any size."""
    monkeypatch.setattr(divergence_kernels, "BLOCK", 128)
    with interpreted_kernels():
        yield


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("formula", [pytest.param(f, marks=pytest.mark.slow if f in SLOW else ()) for f in FORMULAS])
def test_rows_against_float64(formula):
    check_rows(row_divergence, 300, FORMULAS[formula], TRANSFORMED if formula in ("jsd 0.5", "reverse KL") else PLAIN)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 517])
@pytest.mark.parametrize("formula", FORMULAS)
def test_rows_of_any_length(formula, columns):
    for numbers in (PLAIN, TRANSFORMED):
        check_rows(row_divergence, columns, FORMULAS[formula], numbers, misplaced=columns % 3)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("formula", ["reverse KL", pytest.param("jsd 0.1", marks=pytest.mark.slow)])
def test_narrow_gradients(formula):
    check_narrow_gradient(row_divergence, 300, FORMULAS[formula], misplaced=0)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("formula", FORMULAS)
def test_tokens_whose_probabilities_have_no_product_in_float32(formula):
    check_small_probabilities(row_divergence, FORMULAS[formula])


@pytest.mark.usefixtures("interpreter")
def test_empty_rows_and_far_ones():
    check_empty(row_divergence)
    check_offsets_beyond_32_bits(row_divergence)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        pytest.param(case, target, marks=() if target == 90 and "jsd" in case.label else pytest.mark.slow)
        for case in DIVERGENCE_KERNELS
        for target in case.targets
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_machine_code_spills_nothing_and_moves_no_byte_twice(case, target):
    found = resources(compile_kernel(case, target), case.num_warps, target, case.scalar_loads)
    assert found.spill_bytes == 0
    # Two sixteen-byte loads a head and sweep, and two of its bias; narrow ones are of single values of a row.
    sweeps = 2 if case.constants["KIND"] in divergence_kernels.TWO_SWEEPS else 3
    assert found.vector_loads == 4 * sweeps * (2 if case.constants["P_BIAS"] else 1)
    assert found.narrow_loads <= 3
    assert case.constants["P_BIAS"] or found.streamed_bytes == case.least_bytes


@pytest.mark.usefixtures("interpreter")
def test_the_op_on_interpreted_kernels():
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator) for size in ((3, 8), (150, 8), (3, 12), (150, 12))]
    options = {"beta": 0.3, "temperature": 0.8, "softcap": 4.0, "weights": torch.tensor([0.5, 1.0, 2.0])}
    found = {}
    for backend in ("triton", "torch"):
        student = [one.clone().requires_grad_() for one in given[:2]]
        loss, scores = linear_divergence(*student, *given[2:], **options, outputs=OUTPUTS, backend=backend)
        loss.backward()
        found[backend] = [loss, scores.divergence, scores.entropy, scores.is_same_top1, *(one.grad for one in student)]
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-6)


def test_a_gpu_is_served_by_the_kernel():
    assert supports("linear_divergence", "triton", "cuda", torch.bfloat16).ok
    facts = device_facts(torch.device("cuda"))
    assert choose_backend("linear_divergence", None, facts, torch.bfloat16) in ("cuda", "triton")
