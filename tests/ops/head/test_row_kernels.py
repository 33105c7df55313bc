"""The C++ row kernels themselves: every instruction set against the reference, and as torch.library ops."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from support.elementary_functions import check_exponential, check_tanh
from support.instruction_sets import CPU_FLAGS, check_instruction_set, cpu_has
from support.packed_rows import COLUMNS, PLAIN, TRANSFORMED, check_packing
from trl_fast.ops.head.row_kernels import (
    ROW_KERNELS,
    row_grad_reference,
    row_lse_gradient_by_two,
    row_scores_reference,
)
from trl_fast.ops.head.row_statistics import (
    ENTROPY,
    IS_TOP1,
    LOG_SUM_SQ_PROBS,
    LOG_SUM_SQ_ROW,
    LSE_ROW,
    MEAN_LOGITS,
)
from trl_fast.ops.head.sweep import finish_scores, new_state

pytestmark = pytest.mark.usefixtures("extension")

EVERYTHING = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1


def rows(dtype, columns, transform):
    """Logits with a row stride, an offset of 1e4, −inf and equal largest values; targets, bias, transform."""
    generator = torch.Generator().manual_seed(columns)
    logits = (4 * torch.randn(7, columns + 3, generator=generator)).to(dtype)[:, :columns]
    logits[1] += 1e4 if dtype != torch.float16 else 1e3
    logits[2, 1::2] = float("-inf")
    logits[3] = 1.5
    targets = torch.randint(0, columns, (7,), generator=generator)
    bias = torch.randn(columns, generator=generator) if transform == "all" else None
    return logits, targets, bias, ((0.5, 30.0, 1.25) if transform == "all" else (1.0, 0.0, 1.0))


def statistics(kernel, logits, targets, bias, constants, outputs, tiles=1):
    """Returns the statistics that a kernel computes of the rows, given in tiles."""
    state = new_state(len(logits), logits.device)
    columns = logits.shape[1]
    for start in range(0, columns, -(-columns // tiles)):
        part = slice(start, min(start + -(-columns // tiles), columns))
        tile_bias = None if bias is None else bias[part]
        kernel(logits[:, part], targets, tile_bias, *constants, outputs, start, state)
    return finish_scores(state, outputs, columns, torch.promote_types(logits.dtype, torch.float32))


def compare(dtype, columns, transform):
    """Both kernels against their references; each computes in float32 from the same logits."""
    logits, targets, bias, constants = rows(dtype, columns, transform)
    arguments = (logits, targets, bias, *constants)
    exact_bias = None if bias is None else bias.double()
    exact = statistics(row_scores_reference, logits.double(), targets, exact_bias, constants, EVERYTHING)
    for tiles in (1, 3):
        got = statistics(torch.ops.trl_fast.row_scores, logits, targets, bias, constants, EVERYTHING, tiles)
        expected = statistics(row_scores_reference, logits, targets, bias, constants, EVERYTHING)
        torch.testing.assert_close(got[:6], expected[:6], rtol=2e-5, atol=2e-3, equal_nan=True)
        lse = got[0].double() + got[6]
        torch.testing.assert_close(lse[2:], exact[0][2:], rtol=1e-6, atol=1e-6, equal_nan=True)

    coefficients = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    coefficients[1, ::3] = 0
    lse = expected[0].contiguous()
    wanted = torch.full_like(logits, float("nan"))
    row_grad_reference(*arguments, lse, coefficients, 0, wanted)
    out = logits.clone()
    torch.ops.trl_fast.row_grad(out, *arguments[1:], lse, coefficients, 0, out)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(out, wanted, equal_nan=True, **tolerance)


def compare_everything():
    check_exponential(ROW_KERNELS["cpp"])
    check_tanh(ROW_KERNELS["cpp"])
    for columns, transform in itertools.product(COLUMNS, (PLAIN, TRANSFORMED)):
        check_packing(ROW_KERNELS["cpp"], columns, transform, (torch.float32,))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (1, 5, 16, 2047, 2048, 2049, 4099):
            for transform in ("none", "all"):
                compare(dtype, columns, transform)
            test_scores_and_weights_in_one_read(columns, dtype, (0.5, 9.0, 1 / 1.3), EVERYTHING)


@pytest.mark.parametrize("isa", CPU_FLAGS)
def test_every_instruction_set_of_this_machine(isa):
    check_instruction_set(isa, compare_everything)


def test_exponentials_and_tanh_of_pytorchs_kernels():
    check_exponential(ROW_KERNELS["torch"])
    check_tanh(ROW_KERNELS["torch"])


def test_squared_probabilities_in_float64():
    """Of a flat row, of one that is sure of its target, of another class, and of a target that is ruled out."""
    columns, high = 4099, 20.0
    logits, targets = torch.zeros(4, columns, dtype=torch.float64), torch.tensor([7, 7, 8, 9])
    logits[1:3, 7], logits[3, 9] = high, -math.inf
    got = statistics(row_scores_reference, logits, targets, None, (1.0, 0.0, 1.0), LOG_SUM_SQ_PROBS)[LOG_SUM_SQ_ROW]
    sure = math.log1p((columns - 1) * math.exp(-2 * high)) - 2 * math.log1p((columns - 1) * math.exp(-high))
    exact = torch.tensor([-math.log(columns), sure, sure, -math.log(columns - 1)], dtype=torch.float64)
    torch.testing.assert_close(got[[0, 1, 3]], exact[[0, 1, 3]], rtol=1e-15, atol=0)
    # The sum of the others has the 1 of the largest beside what is left.
    torch.testing.assert_close(got[2], exact[2], rtol=0, atol=8e-15)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((1e39, 0.0, 1.0), "scale: expected a number that float32 has"),
        ((1.0, 1e-320, 1.0), "softcap: expected a number that float32 has"),
        ((1.0, 0.0, 1e39), "inv_temperature: expected a number that float32 has"),
        ((float("nan"), 0.0, 1.0), "scale: expected a number that float32 has"),
    ],
)
def test_a_transform_that_float32_cannot_hold_is_refused_by_name(numbers, message):
    with pytest.raises(ValueError, match=message):
        statistics(
            torch.ops.trl_fast.row_scores, torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), None, numbers, 0
        )


def test_rows_are_shared_among_torchs_threads():
    from trl_fast import _C

    if "lang" in _C.build_info()["compiler"]:
        pytest.skip("setup.py has clang build kernels of one thread")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert _C.build_info()["row_threads"] == threads
    finally:
        torch.set_num_threads(before)


def test_an_unknown_instruction_set_is_refused_by_name():
    program = "import trl_fast.ops.backends as b; b.load_extension()"
    environment = {**os.environ, "TRL_FAST_CPU_ISA": "avx9"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode and "TRL_FAST_CPU_ISA=avx9" in result.stderr and "avx2" in result.stderr


_SMALL_SIGNAL_STACK = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(2048)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 2048)), None) == 0
"""


@pytest.mark.parametrize("forced", ["", "amx"])
def test_tiles_that_linux_refuses_are_named(forced):
    """A process whose stack for signals has no room for tiles gets the next best kernels, and one line says why."""
    if not cpu_has("amx"):
        pytest.skip("this CPU has no amx: nothing to refuse")
    program = _SMALL_SIGNAL_STACK + "import trl_fast.ops.backends as b; print(b.load_extension().reason)"
    environment = {**os.environ, "TRL_FAST_CPU_ISA": forced}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    why = "amx: Linux does not let this process use its tiles: No space left on device"
    if forced:
        assert result.returncode and f"TRL_FAST_CPU_ISA={why}" in result.stderr
    else:
        assert result.stdout.endswith("instruction set avx512\n"), result.stderr
        assert result.stderr == f"The CPU kernels use avx512, which is slower. {why}.\n"


@pytest.mark.parametrize("transform", ["none", "all"])
def test_opcheck(transform):
    logits, targets, bias, constants = rows(torch.float32, 33, transform)
    arguments = (logits, targets, bias, *constants)
    torch.library.opcheck(torch.ops.trl_fast.row_scores, (*arguments, EVERYTHING, 0, new_state(7, logits.device)))
    lse = statistics(row_scores_reference, logits, targets, bias, constants, 0)[0].contiguous()
    out = torch.empty_like(logits)
    torch.library.opcheck(torch.ops.trl_fast.row_grad, (*arguments, lse, torch.rand(4, 7), 0, out))


def test_only_what_was_asked_for_is_computed():
    logits, targets, bias, constants = rows(torch.float32, 33, "none")
    got = statistics(torch.ops.trl_fast.row_scores, logits, targets, bias, constants, MEAN_LOGITS)
    assert not got[[0, 1, 4]].isnan().any() and got[[2, 3, 5]].isnan().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(7, 33, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(33, 7).T}, "logits"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "targets"),
        ({"bias": torch.zeros(5)}, "bias"),
        ({"state": torch.zeros(7, 6, dtype=torch.float64)}, "state"),
        ({"state": torch.zeros(7, 7)}, "state"),
    ],
)
def test_bad_input_is_named(change, message):
    logits, targets, bias, constants = rows(torch.float32, 33, "none")
    given = {"logits": logits, "targets": targets, "bias": bias, "state": new_state(7, logits.device), **change}
    with pytest.raises(ValueError, match=message):
        torch.ops.trl_fast.row_scores(
            given["logits"], given["targets"], given["bias"], *constants, 0, 0, given["state"]
        )


@pytest.mark.parametrize("columns", [1, 7, 300, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", [(1.0, 0.0, 1.0), (0.5, 9.0, 1 / 1.3)], ids=["plain", "softcap"])
@pytest.mark.parametrize("outputs", [0, EVERYTHING])
def test_scores_and_weights_in_one_read(columns, dtype, transform, outputs):
    """row_weights against the reference's two kernels: the state, and e^(u - m) du/dz in place of the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, columns, generator=generator)
    logits[2] = float("-inf")
    logits[3, 0] = float("-inf")
    logits[4, columns // 2] = 30.0
    logits[5, columns - 1] = float("nan")
    logits = logits.to(dtype)
    bias = torch.randn(columns, generator=generator)
    targets = torch.tensor([0, columns - 1, 0, columns // 2, 3 * columns, 0])
    before = new_state(6, logits.device)
    row_scores_reference(torch.randn(6, 11, generator=generator), targets, None, 1.0, 0.0, 1.0, outputs, 0, before)
    before[:, 1] = new_state(1, logits.device)[:, 0]
    states, tiles = (before.clone(), before.clone()), (logits.clone(), logits.clone())
    torch.ops.trl_fast.row_weights(tiles[0], targets + 11, bias, *transform, outputs, 11, states[0], tiles[0])
    row_lse_gradient_by_two(
        ROW_KERNELS["torch"], tiles[1], targets + 11, bias, *transform, outputs, 11, states[1], tiles[1]
    )
    tolerance = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)}[dtype]
    found, expected = (finish_scores(state, outputs, columns + 11, torch.float32) for state in states)
    torch.testing.assert_close(found[:, :5], expected[:, :5], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found[LSE_ROW, 5].isnan() and expected[LSE_ROW, 5].isnan()
    torch.testing.assert_close(tiles[0][:5], tiles[1][:5], rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("columns", [4096 + 48, 6144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_logit_may_come_late_and_most_may_be_the_least_that_there_is(dtype, columns):
    """Logits that nothing changes are read where they lie, and sums of a chunk taken again if it has a larger one."""
    rising = torch.linspace(-30.0, 40.0, columns)
    masked = torch.full((columns,), torch.finfo(dtype).min)
    masked[columns - 70 :] = torch.linspace(-2.0, 3.0, 70)
    logits = torch.stack([rising, rising.flip(0), masked, masked.flip(0), rising.sin()]).to(dtype)
    targets = torch.tensor([columns - 1, 17, columns - 3, 5, 2 * columns])
    given = (targets, None, 1.0, 0.0, 1.0)
    exact = statistics(row_scores_reference, logits.double(), targets, None, (1.0, 0.0, 1.0), EVERYTHING)
    for tiles in (1, 2):
        found = statistics(torch.ops.trl_fast.row_scores, logits, targets, None, (1.0, 0.0, 1.0), EVERYTHING, tiles)
        torch.testing.assert_close(found[:4].double(), exact[:4], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(found[5].double(), exact[5])
    states, out, wanted = [new_state(5, logits.device) for _ in range(2)], logits.clone(), logits.double()
    torch.ops.trl_fast.row_weights(out, *given, EVERYTHING, 0, states[0], out)
    row_lse_gradient_by_two(ROW_KERNELS["torch"], wanted, *given, EVERYTHING, 0, states[1], wanted)
    found = finish_scores(states[0], EVERYTHING, columns, torch.float32)
    torch.testing.assert_close(found[:4].double(), exact[:4], rtol=1e-6, atol=1e-6, equal_nan=True)
    # u - m is rounded to float32, where it is up to 70.
    tolerance = {"rtol": max(1e-5, torch.finfo(dtype).eps), "atol": torch.finfo(dtype).tiny}
    torch.testing.assert_close(out.double(), wanted, **tolerance)
