"""The heads of other libraries in the race: what they are called with, and why they do not run here."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from benchmarks import library_heads
from benchmarks.head_problem import make_problem
from benchmarks.library_heads import LIBRARY_HEADS, heads_for
from benchmarks.linear_logprob import contenders
from benchmarks.timing import race

CPU = torch.device("cpu")


@pytest.fixture
def problem():
    return make_problem(6, 8, 40, torch.float32, CPU)


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both libraries, as they are called; returns the gradients that each call left."""
    calls = []

    class Loss:
        def __init__(self, reduction):
            self.reduction = reduction

        def __call__(self, weight, hidden, targets):
            calls.append((self.reduction, weight.requires_grad, hidden.requires_grad))
            return F.cross_entropy(hidden @ weight.t(), targets, reduction=self.reduction)

    def linear_cross_entropy(hidden, weight, targets, *, reduction, filter_eps):
        calls.append((reduction, filter_eps, weight.requires_grad, hidden.requires_grad))
        return F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)

    liger, cut = ModuleType("liger_kernel.transformers"), ModuleType("cut_cross_entropy")
    liger.LigerFusedLinearCrossEntropyLoss, cut.linear_cross_entropy = Loss, linear_cross_entropy
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    return calls


@pytest.mark.parametrize("mode, trains", [("trained", (True, True)), ("frozen", (False, True))])
def test_what_libraries_are_called_with(problem, libraries, monkeypatch, mode, trains):
    wanted, seen = problem.for_mode(mode), []
    wanted.hidden.register_hook(lambda gradient: seen.append(gradient.abs().sum() > 0))
    for head in LIBRARY_HEADS.values():
        head.make(wanted)()
    assert libraries == [("sum", *trains), ("none", "auto", *trains), ("none", None, *trains)]
    assert all(seen) and len(seen) == 3
    assert wanted.hidden.grad is None and wanted.weight.grad is None


def test_scoring_asks_for_losses_of_tokens_only(problem):
    assert heads_for(problem, sums_only=False).keys() == {"cce", "cce exact"}
    assert heads_for(problem, sums_only=True).keys() == LIBRARY_HEADS.keys()


def test_the_race_says_why_a_library_did_not_run(problem, monkeypatch):
    monkeypatch.setattr(
        library_heads.importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else object()
    )
    raced = contenders(problem, "frozen", {"TRL", "plain", "ours", "floor"}, libraries=True)
    race(raced, 1, 10.0, CPU, "frozen", keep_going=True)
    assert {contender.name: contender.failure for contender in raced} == {
        "Liger": "RuntimeError: liger-kernel==0.8.5 is not installed: pip install liger-kernel==0.8.5",
        "cce": "RuntimeError: its kernels need a GPU",
        "cce exact": "RuntimeError: its kernels need a GPU",
    }
