"""The race of divergences: everyone in it computes the same gradients, on small heads."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks.head_problem import make_problem
from benchmarks.linear_divergence import FLOOR, LIGER, Pair, contenders, ours, plain, trl
from benchmarks.timing import race

CPU = torch.device("cpu")


@pytest.fixture
def heads():
    return [make_problem(6, width, 40, torch.float32, CPU) for width in (8, 12)]


def gradients(run, pair):
    """Gradients that a run leaves, before it drops them."""
    found = []
    pair.finish = lambda loss: found.extend(torch.autograd.grad(loss, pair.tensors[:2]))
    run()
    return found


def test_peers_compute_the_same(heads):
    pair = Pair(heads[0].for_mode("trained"), heads[1].for_mode("scoring"), 0.3)
    wanted = gradients(plain(pair), pair)
    for run in (ours(pair, "torch"), trl(pair)):
        for one, other in zip(gradients(run, pair), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["trained", "frozen"])
def test_everyone_runs(heads, mode, monkeypatch):
    class Loss:
        def __init__(self, weight_hard_loss, weight_soft_loss, beta):
            assert (weight_hard_loss, weight_soft_loss, beta) == (0.0, 1.0, 0.5)

        def __call__(self, hidden, weight, teacher_hidden, teacher_weight, labels):
            assert labels.shape == hidden.shape[:1] and teacher_hidden.shape[1] == teacher_weight.shape[1]
            return (hidden @ weight.t()).sum()

    names = ["liger_kernel", "liger_kernel.chunked_loss", "liger_kernel.chunked_loss.jsd_loss"]
    for name in names:
        module = ModuleType(name)
        module.__spec__ = object()
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules[names[-1]].LigerFusedLinearJSDLoss = Loss
    raced = contenders(*heads, 0.5, mode, ["torch"])
    race(raced, 1, 60.0, CPU, mode)
    found = {one.name: one for one in raced}
    assert {FLOOR, LIGER} <= set(found) and not any("torch" in name for name in found)
    assert all(one.seconds and one.failure is None for one in raced)
