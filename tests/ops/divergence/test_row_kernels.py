"""The row kernels of divergences: every instruction set against float64, extreme rows, the torch.library op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from support.divergences import KINDS, row_divergences
from support.heads import assert_as_good
from support.instruction_sets import CPU_FLAGS, check_instruction_set
from trl_fast.ops.backends import load_extension
from trl_fast.ops.divergence.formulas import DivergenceFormula
from trl_fast.ops.divergence.row_kernels import DIVERGENCE_KERNELS, row_divergence_reference

R = 5
PLAIN, TRANSFORMED = ((1.0, 0.0), (1.0, 0.0), 1.0), ((0.7, 5.0), (-1.2, 4.0), 0.8)
CLOSE, SURE, OPPOSED, OFFSET, RANDOM = "close", "sure", "opposed", "offset", "random"


def pair(case, columns, seed=0):
    """Raw products of a student and a teacher (R, V), in memory with a row stride."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(R, columns + 3, generator=generator)[:, :columns] for _ in range(2))
    if case == CLOSE:
        t.copy_(s + 1e-3 * t)
    elif case == SURE:
        s *= 0.05
        t *= 0.05
        s[:, columns // 2] += 24
        t[:, columns // 2] += 27
    elif case == OPPOSED:
        s[:, 0] += 60
        t[:, -1] += 80
    elif case == OFFSET:
        s += 1e4
        t -= 1e4
    return s, t


def run(kernel, s, t, kind, beta, numbers=PLAIN, biases=(None, None), weights=None):
    """Results (3, R), poisoned before, and the gradient in the student's place."""
    weights = torch.linspace(0.5, 2, R, dtype=torch.float32) if weights is None else weights
    exact = s.dtype == torch.float64
    room = torch.full((3, R + 2), math.nan, dtype=s.dtype if exact else torch.float32)
    out = s.clone(memory_format=torch.preserve_format)
    (scale_s, cap_s), (scale_t, cap_t), inv_temperature = numbers
    formula = DivergenceFormula.of(kind, beta)
    kernel(
        *(out, biases[0], scale_s, cap_s, t.clone(), biases[1], scale_t, cap_t, inv_temperature, *formula),
        *(weights.to(room.dtype), room[:, :R], out),
    )
    assert room[:, R:].isnan().all()
    return room[:, :R], out


def by_pytorch(s, t, kind, beta, numbers, biases):
    """Divergences (R,) and gradient by autograd, in the dtype of the products."""
    (scale_s, cap_s), (scale_t, cap_t), inv_temperature = numbers
    leaf = s.detach().clone().requires_grad_()
    logps = []
    for raw, bias, scale, cap in ((leaf, biases[0], scale_s, cap_s), (t, biases[1], scale_t, cap_t)):
        u = (raw if bias is None else raw + bias.to(raw.dtype)) * scale
        u = cap * torch.tanh(u / cap) if cap else u
        logps.append((u * inv_temperature).log_softmax(-1))
    divergence = row_divergences(kind, beta, *logps)
    (gradient,) = torch.autograd.grad((divergence * torch.linspace(0.5, 2, R).to(s.dtype)).sum(), leaf)
    return divergence.detach(), gradient


def compare(kernel, case, columns, kind, beta, dtype=torch.float32, numbers=PLAIN):
    """A kernel against float64: as good as autograd in float32."""
    s, t = (x.to(dtype) for x in pair(case, columns))
    biases = (None, None)
    if numbers is TRANSFORMED:
        biases = tuple(torch.randn(columns, generator=torch.Generator().manual_seed(i)) for i in (7, 8))
    results, gradient = run(kernel, s, t, kind, beta, numbers, biases)
    exact, true = run(row_divergence_reference, s.double(), t.double(), kind, beta, numbers, biases)
    baseline, theirs = by_pytorch(s.float(), t.float(), kind, beta, numbers, biases)
    what = f"{case}, {columns} columns, {kind} {beta}"
    assert_as_good(results[0], baseline, exact[0], f"divergence, {what}", 1e-6)
    torch.testing.assert_close(results[1].double(), exact[1], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(results[2].double(), exact[2])
    if kind == "tvd" and case == CLOSE:
        return  # the sign of a difference in the last place is luck
    floor = 1e-6 if dtype == torch.float32 else 4e-3
    assert_as_good(gradient, theirs.to(dtype), true, f"gradient, {what}", floor)


def compare_everything(kernel=None):
    kernel = kernel or DIVERGENCE_KERNELS["cpp"].divergence
    for kind, beta in (*KINDS, ("jsd", 1e-4), ("jsd", 1 - 1e-6), ("skewed_reverse_kl", 0.6)):
        for case in (CLOSE, SURE, OFFSET, RANDOM):
            compare(kernel, case, 2049, kind, beta)
        for columns in (1, 5, 16, 2048, 4099):
            compare(kernel, RANDOM, columns, kind, beta)
        for dtype in (torch.bfloat16, torch.float16):
            compare(kernel, RANDOM, 77, kind, beta, dtype)
        compare(kernel, RANDOM, 300, kind, beta, numbers=TRANSFORMED)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set_of_this_machine(isa):
    check_instruction_set(isa, compare_everything)


def test_pytorchs_kernel():
    compare_everything(DIVERGENCE_KERNELS["torch"].divergence)


@pytest.fixture(params=["torch", "cpp"])
def kernel(request):
    if request.param == "cpp" and not load_extension().ok:
        pytest.skip(load_extension().reason)
    return DIVERGENCE_KERNELS[request.param].divergence


@pytest.mark.parametrize("kind, beta", KINDS[2:])
def test_rows_that_have_nothing_in_common_are_finite(kernel, kind, beta):
    s, t = pair(OPPOSED, 50)
    results, gradient = run(kernel, s, t, kind, beta)
    exact, _ = by_pytorch(s.double(), t.double(), kind, beta, PLAIN, (None, None))
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-6, atol=0)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kind, beta", KINDS[3:5])
def test_tokens_whose_probabilities_have_no_product_in_float32(kernel, kind, beta):
    s, t = torch.tensor([[0.0, -60.0, -1.0]] * R), torch.tensor([[0.0, -62.0, -1.5]] * R)
    gradient = run(kernel, s, t, kind, beta)[1]
    exact = by_pytorch(s.double(), t.double(), kind, beta, PLAIN, (None, None))[1]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtypes", itertools.permutations((torch.float32, torch.bfloat16), 2))
def test_both_sides_have_their_own_dtype(kernel, dtypes):
    s, t = (x.to(dtype) for x, dtype in zip(pair(RANDOM, 40), dtypes, strict=True))
    results, gradient = run(kernel, s, t, "jsd", 0.3)
    exact, true = run(row_divergence_reference, s.double(), t.double(), "jsd", 0.3)
    torch.testing.assert_close(results.double(), exact, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_tokens_that_are_ruled_out(kernel, kind, beta):
    """Minus infinity: of both sides, and where the divergence stays finite, of one."""
    s, t = pair(RANDOM, 60)
    s[:, 10:20] = t[:, 10:20] = -math.inf
    finite_for = {"student": (kind, beta) != ("jsd", 0.0), "teacher": (kind, beta) != ("jsd", 1.0)}
    if finite_for["student"]:
        s[0, 25:30] = -math.inf
    if finite_for["teacher"]:
        t[1, 35:40] = -math.inf
    results, gradient = run(kernel, s, t, kind, beta)
    exact, true = run(row_divergence_reference, s.double(), t.double(), kind, beta)
    assert exact.isfinite().all() and true.isfinite().all()
    torch.testing.assert_close(results.double(), exact, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(gradient.double(), true, rtol=1e-4, atol=1e-7)
    assert not gradient[:, 10:20].any()


def test_divergences_that_are_infinite_say_so(kernel):
    for kind, beta, side in (("jsd", 0.0, 0), ("jsd", 1.0, 1)):
        rows = pair(RANDOM, 60)
        rows[side][0, 5] = -math.inf
        results, _ = run(kernel, *rows, kind, beta)
        assert results[0, 0] == math.inf and results[0, 1:].isfinite().all()


def test_numbers_that_are_no_numbers_are_seen(kernel):
    s, t = pair(RANDOM, 60)
    s[0, 7], t[1, 9], s[2, 3] = math.nan, math.nan, math.inf
    results, gradient = run(kernel, s, t, "jsd", 0.5)
    assert results[0, :3].isnan().all() and results[:, 3:].isfinite().all()
    assert gradient[:3].isnan().any(dim=1).all() and gradient[3:].isfinite().all()


def test_equal_rows_and_rows_of_weight_zero(kernel):
    s, _ = pair(RANDOM, 60)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    for kind, beta in KINDS:
        results, gradient = run(kernel, s, s, kind, beta, weights=weights)
        assert not results[0].any() and results[2].all() and not gradient.any()
    s[1] = math.nan
    _, gradient = run(kernel, s, s.flip(1), "jsd", 0.3, weights=weights)
    assert not gradient[1].any() and gradient[0].any() and gradient.isfinite().all()


@pytest.mark.usefixtures("extension")
def test_opcheck():
    s, t = (x.contiguous() for x in pair(RANDOM, 40))
    sides = (s, torch.randn(40), 0.7, 3.0, t, None, 1.0, 0.0, 0.9)
    arguments = (*sides, *DivergenceFormula.of("jsd", 0.3), torch.rand(R), torch.empty(3, R), torch.empty_like(s))
    torch.library.opcheck(torch.ops.trl_fast.row_divergence, arguments)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    "place, value, message",
    [
        (4, torch.zeros(R, 41), "teacher: expected the student's shape"),
        (13, torch.zeros(R + 1), "weights: expected shape"),
        (14, torch.zeros(2, R), "results: expected float32 of shape"),
        (15, torch.zeros(R, 40).half(), "gradient: expected the student's dtype"),
        (11, 1.5, "mixture: expected a number from 0 to 1"),
        (6, 1e39, "scale: expected a number that float32 has"),
    ],
)
def test_wrong_arguments_are_refused_by_name(place, value, message):
    s, t = pair(RANDOM, 40)
    sides = (s, None, 1.0, 0.0, t, None, 1.0, 0.0, 1.0)
    arguments = [*sides, *DivergenceFormula.of("jsd", 0.3), torch.rand(R), torch.empty(3, R), torch.empty(R, 40)]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.trl_fast.row_divergence(*arguments)
