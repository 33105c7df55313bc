"""Holds the cost of a divergence: two row blocks of logits, and the design's count of passes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.memory import measure_peak
from support.divergences import make_divergence
from trl_fast.ops import linear_divergence_to_given
from trl_fast.ops.backends import load_extension
from trl_fast.ops.divergence import heads, sweep

N, V, H, HT = 105, 4096, 24, 32
FROZEN = ("weight",)


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if request.param == "cpp" and not load_extension().ok:
        pytest.skip(load_extension().reason)
    return request.param


def step(backend, frozen=(), rows=N, given=False, **named):
    """A step of the loss and its gradients, `rows` of which count."""
    problem = make_divergence(N, V, weights=False, **named)
    problem.weights = (torch.arange(N) < rows).float()
    for name in frozen:
        setattr(problem.student, name, getattr(problem.student, name).detach())
    if not given:
        return lambda **more: problem.run(backend=backend, **more).loss.backward()
    logprobs, ids = problem.distributions(None)[1].topk(4)
    s = problem.student
    student = (s.hidden, s.weight, logprobs, ids)
    return lambda **more: linear_divergence_to_given(
        *student, weights=problem.weights, beta=0.5, backend=backend, **more
    ).loss.backward()


def passes(run):
    """The products that a step computes, as {"student": passes over N·V·H, "teacher": passes over N·V·H'}."""
    count = {"student": 0, "teacher": 0}

    def counted(multiply):
        def product(out, left, right):
            width = next(size for size in (*left.shape, *right.shape) if size in (H, HT))
            size = left.shape[0] * left.shape[1] * right.shape[1]
            count["student" if width == H else "teacher"] += size / (N * V * width)
            return multiply(out, left, right)

        return product

    with (
        mock.patch.object(heads, "mm_into", counted(heads.mm_into)),
        mock.patch.object(sweep, "mm_into", counted(sweep.mm_into)),
        mock.patch.object(sweep, "add_mm", counted(sweep.add_mm)),
    ):
        run()
    return {name: round(number, 3) for name, number in count.items()}


@pytest.mark.parametrize("top_k", [None, 3])
def test_four_passes_with_a_trained_head_and_three_with_a_frozen_one(backend, top_k):
    named = {} if top_k is None else {"top_k": top_k}
    workspace = 40 * V * (8 + 80)
    assert passes(lambda: step(backend, **named)(workspace_bytes=workspace)) == {"student": 3, "teacher": 1}
    assert passes(step(backend, FROZEN, **named)) == {"student": 2, "teacher": 1}
    assert passes(step(backend, ("hidden",), **named)) == {"student": 2, "teacher": 1}


def test_a_given_teacher_takes_a_pass_less(backend):
    assert passes(step(backend, given=True)) == {"student": 3, "teacher": 0}
    assert passes(step(backend, FROZEN, given=True)) == {"student": 2, "teacher": 0}


def test_rows_of_weight_zero_take_no_product(backend):
    assert passes(step(backend, rows=N // 3)) == {"student": 1, "teacher": 0.333}


@pytest.mark.parametrize("named", [{}, {"top_k": 3}, {"given": True}, {"kind": "skewed_reverse_kl", "beta": 0.1}])
def test_a_step_stays_inside_its_workspace(backend, named):
    workspace = 24 * V * (8 + 80)
    run = step(backend, **named)
    # Beside it: the weight's gradient, twice as it is scaled in backward, and vectors.
    allowed = workspace + 2 * V * H * 4 + 8 * N * (H + HT) * 4 + 200 * N * 4
    assert measure_peak(lambda: run(workspace_bytes=workspace)).peak_bytes < allowed
