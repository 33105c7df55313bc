"""Tests the ops on random inputs, and that the random inputs find an error of 1e-4 wherever it is planted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from support.fuzz import product_trials
from support.fuzz.hold import Held
from support.fuzz.runner import TRIALS, fuzzing, run_case
from support.heads import BACKENDS
from trl_fast.ops import layers
from trl_fast.ops.divergence.row_kernels import DIVERGENCE_ROW
from trl_fast.ops.divergence.sweep import StudentGradients
from trl_fast.ops.head import sweep
from trl_fast.ops.head.gradients import HeadGradients
from trl_fast.ops.head.row_statistics import ENTROPY_ROW, LOGPROB_ROW

# The modules: their names in the package are those of the functions in them.
policy_module, selective_module, divergence_module = (
    importlib.import_module(f"trl_fast.ops.{name}")
    for name in ("policy_loss", "selective_log_softmax", "linear_divergence")
)
CASES = 300
PARTS = 3
# Most cases until a planted error has to be found.
ENOUGH = 150


@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases(part):
    with fuzzing():
        outcomes = [run_case(0, index) for index in range(part, CASES, PARTS)]
    faulty = [str(outcome) for outcome in outcomes if outcome.faults]
    assert not faulty, "run one again with `make fuzz CASE=seed/index`:\n" + "\n".join(faulty)
    assert len({outcome.op for outcome in outcomes}) == len(TRIALS)
    assert all(any(f"backend={name}" in outcome.said for outcome in outcomes) for name in BACKENDS)


def test_a_case_is_its_line():
    with fuzzing():
        first, second, other = (run_case(0, index) for index in (5, 5, 6))
    assert (first.said, first.worst) == (second.said, second.worst)
    assert first.said != other.said


def changed(function: Callable, change: Callable[[object], None]) -> Callable:
    """Returns a function that changes what another gives."""

    def give(*args, **named):
        result = function(*args, **named)
        change(result)
        return result

    return give


def of_the_first_row(row: int) -> Callable[[torch.Tensor], None]:
    """Returns what puts an error of 1e-4 into one statistic of the first row."""

    def change(statistics: torch.Tensor) -> None:
        statistics[row, :1] *= 1 + 1e-4

    return change


def of_a_gradient(number: int) -> Callable[[tuple[torch.Tensor, ...]], None]:
    """Returns what puts an error of 1e-4 into one gradient."""

    def change(gradients: tuple[torch.Tensor, ...]) -> None:
        gradients[number][:1] *= 1 + 1e-4

    return change


def of_a_divergence(found: tuple[torch.Tensor, ...]) -> None:
    """Puts an error of 1e-4 into the first row's divergence."""
    found[0][DIVERGENCE_ROW, :1] *= 1 + 1e-4


def of_a_term(terms: torch.Tensor) -> None:
    """Puts an error of 1e-4 into the first token's term, in float32 only: float64 is what it is held to."""
    if terms.dtype == torch.float32:
        terms[:1].data.mul_(1 + 1e-4)


def of_a_result(result: torch.Tensor) -> None:
    """Puts an error of 1e-4 into the first numbers of a result."""
    result.data[:1] *= 1 + 1e-4


def of_the_first_result(results: tuple[torch.Tensor, ...]) -> None:
    """Puts an error of 1e-4 into the first numbers of the first result."""
    of_a_result(results[0])


PLANTED = {
    "a row's log-prob": ("linear_logprob", sweep, "finish_scores", of_the_first_row(LOGPROB_ROW)),
    "a row's entropy": ("linear_logprob", sweep, "finish_scores", of_the_first_row(ENTROPY_ROW)),
    "a loss of the head": ("linear_cross_entropy", sweep, "finish_scores", of_the_first_row(LOGPROB_ROW)),
    "a row's gradient": ("linear_token_loss", HeadGradients, "results", of_a_gradient(0)),
    "a word's gradient": ("linear_cross_entropy", HeadGradients, "results", of_a_gradient(1)),
    "a bias's gradient": ("linear_token_loss", HeadGradients, "results", of_a_gradient(2)),
    "a row's divergence": ("linear_divergence", divergence_module, "sweep_divergence", of_a_divergence),
    "a student's gradient": ("linear_divergence", StudentGradients, "results", of_a_gradient(0)),
    "a given row": ("selective_log_softmax", selective_module, "finish_scores", of_the_first_row(LOGPROB_ROW)),
    "a product": ("product", product_trials, "mm_into", of_a_result),
    "a row's norm": ("layer", layers, "rms_norm", of_a_result),
    "a norm beside its residual": ("layer", layers, "norm_and_residual", of_the_first_result),
    "a layer with LoRA": ("layer", layers, "lora_linear", of_a_result),
    "layers of one input": ("layer", layers, "joint_linear", of_the_first_result),
    "a policy's term": ("policy_loss", policy_module, "clip_terms", of_a_term),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_planted_error_is_found(where):
    op, place, name, change = PLANTED[where]
    with fuzzing(), mock.patch.object(place, name, changed(getattr(place, name), change)):
        found = next((index for index in range(ENOUGH) if run_case(1, index, op).faults), None)
    assert found is not None, f"{ENOUGH} cases of {op} did not find an error in {where}"


def test_numbers_that_are_not_finite_are_faults():
    held = Held()
    exact, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    held.close("nan", bad, exact, exact, 1.0, 1e-6)
    held.close("infinite", exact * float("inf"), exact, exact, 1.0, 1e-6)
    held.close("other shape", exact[:2], exact, exact, 1.0, 1e-6)
    held.same("other bits", exact, torch.nextafter(exact, exact * 2))
    assert len(held.faults) == 4
