"""Holds the divergence's row kernel of every backend to one specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from support.packed_rows import assert_as_good_as, same_bits
from trl_fast.ops.divergence.formulas import DivergenceFormula
from trl_fast.ops.divergence.row_kernels import (
    DIVERGENCE_ROW,
    ENTROPY_ROW,
    IS_SAME_TOP1_ROW,
    NUM_RESULTS,
    row_divergence_reference,
)

FORMULAS = {
    "forward KL": DivergenceFormula.of("jsd", 0.0),
    "reverse KL": DivergenceFormula.of("jsd", 1.0),
    "jsd 0.5": DivergenceFormula.of("jsd", 0.5),
    "jsd 0.1": DivergenceFormula.of("jsd", 0.1),
    "skewed forward KL": DivergenceFormula.of("skewed_forward_kl", 0.1),
    "skewed reverse KL": DivergenceFormula.of("skewed_reverse_kl", 0.1),
    "total variation": DivergenceFormula.of("tvd", 0.0),
}
NUM_ROWS = 11
CLOSE, SURE, NOT_A_NUMBER, UNLIKE, IDLE = 1, 4, 6, 7, 10


class Numbers(NamedTuple):
    """Holds scale and softcap of both heads, the inverse temperature, and whether there are biases."""

    student: tuple[float, float] = (1.0, 0.0)
    teacher: tuple[float, float] = (1.0, 0.0)
    inv_temperature: float = 1.0
    with_bias: bool = False


PLAIN = Numbers()
TRANSFORMED = Numbers((0.5, 30.0), (-1.5, 20.0), 1.25, True)


class Rows(NamedTuple):
    """Holds logits of both heads (R, V), their biases (V,), and the rows' weights (R,)."""

    student: torch.Tensor
    teacher: torch.Tensor
    student_bias: torch.Tensor | None
    teacher_bias: torch.Tensor | None
    weights: torch.Tensor

    def first(self, count: int) -> Rows:
        """Returns the first rows, of heads without biases."""
        return Rows(self.student[:count], self.teacher[:count], None, None, self.weights[:count])

    def to(self, dtype: torch.dtype) -> Rows:
        """Returns the same numbers in float32 or float64."""
        return Rows(*(None if one is None else one.to(dtype) for one in self))


def hard_rows(columns: int, numbers: Numbers = PLAIN, dtype: torch.dtype = torch.float32, misplaced: int = 0) -> Rows:
    """Rows that break kernels, whose strides and starts are no multiples of 16 bytes.

    In order: any; heads that are close; offsets of 1e4 and 300; tokens that both rule out; both sure of one token;
    the same logits; NaN; both sure of another token each; tokens that only the teacher, only the student rules out; a
    student without any token, and a weight of 0.
    """
    generator = torch.Generator().manual_seed(columns)
    room = 3 * torch.randn(2, NUM_ROWS, columns + 4, generator=generator)
    room[1, CLOSE] = room[0, CLOSE] + 1e-2 * torch.randn(columns + 4, generator=generator)
    room[0, 2] += 1e4 if dtype != torch.float16 else 1e3
    room[1, 2] += 300
    room[:, 3, 1::3] = float("-inf")
    room[:, SURE, columns // 2 + misplaced] = torch.tensor([60.0, 50.0])
    room[1, 5] = room[0, 5]
    room[0, NOT_A_NUMBER, columns // 3 + misplaced] = float("nan")
    room[0, UNLIKE, columns // 2 + misplaced] = 40.0
    room[1, UNLIKE, columns - 1 + misplaced] = 50.0
    room[1, 8, 1::3] = room[0, 9, 1::3] = float("-inf")
    room[0, IDLE] = float("-inf")
    student, teacher = (one[:, misplaced : misplaced + columns] for one in room.to(dtype))
    biases = torch.randn(2, columns, generator=generator) if numbers.with_bias else (None, None)
    weights = torch.tensor([1.0, 0.5, -2.0, 1.0, 3.0, 1.0, 1.0, 0.25, 1.0, 1.0, 0.0])
    return Rows(student, teacher, *biases, weights)


def run(
    kernel: Callable[..., None],
    rows: Rows,
    numbers: Numbers,
    formula: DivergenceFormula,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the results (3, R) that a kernel writes, into a room that is wider and holds NaN."""
    precise = torch.float64 if rows.student.dtype == torch.float64 else torch.float32
    room = torch.full((NUM_RESULTS, len(rows.student) + 1), float("nan"), dtype=precise)
    student = (rows.student, rows.student_bias, *numbers.student)
    teacher = (rows.teacher, rows.teacher_bias, *numbers.teacher)
    kernel(*student, *teacher, numbers.inv_temperature, *formula, rows.weights, room[:, :-1], gradient)
    assert room[:, -1].isnan().all()
    return room[:, :-1]


def check_rows(
    kernel: Callable[..., None],
    columns: int,
    formula: DivergenceFormula,
    numbers: Numbers = PLAIN,
    dtype: torch.dtype = torch.float32,
    misplaced: int = 0,
) -> None:
    """Results and gradient against float64, beside PyTorch's in float32; in place, elsewhere, and without a gradient.

    A small divergence is exact, too: relative to itself.
    """
    rows = hard_rows(columns, numbers, dtype, misplaced)
    exact_gradient, baseline_gradient = (
        torch.empty(rows.student.shape, dtype=t) for t in (torch.float64, torch.float32)
    )
    exact = run(row_divergence_reference, rows.to(torch.float64), numbers, formula, exact_gradient)
    baseline = run(row_divergence_reference, rows.to(torch.float32), numbers, formula, baseline_gradient)
    out = torch.full((NUM_ROWS, columns + 2), float("nan"), dtype=dtype)
    got = run(kernel, rows, numbers, formula, out[:, 1:-1])
    assert out[:, [0, -1]].isnan().all()

    # NaN is seen; which token such a row is for means nothing.
    known = ~exact[DIVERGENCE_ROW].isnan()
    assert not known[NOT_A_NUMBER]
    assert torch.equal(got[IS_SAME_TOP1_ROW, known].double(), exact[IS_SAME_TOP1_ROW, known])
    for row in (DIVERGENCE_ROW, ENTROPY_ROW):
        one_each = (found[row, :, None] for found in (baseline, got, exact))
        assert_as_good_as(*one_each, floor=1e-6)
    assert_close_ones_are_exact(got[DIVERGENCE_ROW], exact[DIVERGENCE_ROW], baseline[DIVERGENCE_ROW])
    floor = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    defined = exact[DIVERGENCE_ROW].isfinite()
    one_each = (found[defined] for found in (baseline_gradient, out[:, 1:-1], exact_gradient))
    assert_as_good_as(*one_each, floor=floor)
    assert (out[IDLE, 1:-1] == 0).all() and out[NOT_A_NUMBER, 1:-1].isnan().any()

    assert same_bits(run(kernel, rows, numbers, formula, None), got)
    there = hard_rows(columns, numbers, dtype, misplaced)
    assert same_bits(run(kernel, there, numbers, formula, there.student), got)
    assert same_bits(there.student, out[:, 1:-1])


def assert_close_ones_are_exact(got: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor) -> None:
    """Divergences (R,) of heads that are close, and of such as are sure of one token: to a few digits of their own."""
    for row in (CLOSE, SURE):
        error, theirs = ((found[row].double() - exact[row]).abs() for found in (got, baseline))
        assert error <= 2 * theirs + 2e-5 * exact[row], (row, error, theirs, exact[row])


def check_narrow_gradient(
    kernel: Callable[..., None], columns: int, formula: DivergenceFormula, misplaced: int
) -> None:
    """The float32 gradient, rounded once: elsewhere, and in the first half of each row of the logits."""
    rows = hard_rows(columns, misplaced=misplaced).first(3)
    unrounded = torch.full_like(rows.student, float("nan"))
    results = run(kernel, rows, PLAIN, formula, unrounded)
    for dtype in (torch.bfloat16, torch.float16):
        other = torch.full((3, columns + 3), float("nan"), dtype=dtype)[:, misplaced:][:, :columns]
        assert same_bits(run(kernel, rows, PLAIN, formula, other), results)
        there = hard_rows(columns, misplaced=misplaced).first(3)
        half = there.student.view(dtype)[:, :columns]
        assert same_bits(run(kernel, there, PLAIN, formula, half), results)
        for gradient in (other, half):
            assert same_bits(gradient, unrounded.to(dtype))


def check_small_probabilities(kernel: Callable[..., None], formula: DivergenceFormula) -> None:
    """The gradient of tokens whose two probabilities have no product in float32: to a few digits of its own."""
    student, teacher = torch.tensor([[0.0, -60.0, -1.0, -82.0]]), torch.tensor([[0.0, -62.0, -1.5, -80.0]])
    rows, gradient = Rows(student, teacher, None, None, torch.ones(1)), torch.empty_like(student)
    exact = torch.empty_like(student, dtype=torch.float64)
    run(kernel, rows, PLAIN, formula, gradient)
    run(row_divergence_reference, rows.to(torch.float64), PLAIN, formula, exact)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=0)


def check_empty(kernel: Callable[..., None]) -> None:
    """Without rows nothing is read or written."""
    logits, weights = torch.empty(0, 40), torch.empty(0)
    heads = (logits, None, 1.0, 0.0)
    kernel(*heads, *heads, 1.0, *FORMULAS["jsd 0.5"], weights, torch.empty(NUM_RESULTS, 0), logits)


def check_offsets_beyond_32_bits(kernel: Callable[..., None]) -> None:
    """Three rows, 2³⁰ elements apart; only the pages that are touched take memory."""
    stride, columns = 2**30, 40
    generator = torch.Generator().manual_seed(0)
    spread = []
    for logits in torch.randn(2, 3, columns, generator=generator):
        room = torch.empty(2 * stride + columns).as_strided((3, columns), (stride, 1))
        spread.append(room.copy_(logits))
    rows = Rows(*spread, None, None, torch.ones(3))
    dense = Rows(*(one.clone(memory_format=torch.contiguous_format) for one in spread), None, None, torch.ones(3))
    formula = FORMULAS["jsd 0.5"]
    expected = run(row_divergence_reference, dense, PLAIN, formula, dense.student)
    torch.testing.assert_close(run(kernel, rows, PLAIN, formula, rows.student), expected)
    torch.testing.assert_close(rows.student, dense.student, rtol=1e-5, atol=1e-6)
