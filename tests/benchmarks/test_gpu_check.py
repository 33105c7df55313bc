"""The checks of gpu_check, on the backends that this machine has."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import gpu_check
from support.triton_interpreter import interpreted_kernels

CPU = torch.device("cpu")
HEADS = functools.partial(gpu_check.check_heads, vocab=3001)


@pytest.mark.parametrize(
    "check", [HEADS, gpu_check.check_losses, pytest.param(gpu_check.check_layouts, marks=pytest.mark.slow)]
)
def test_checks_pass_where_the_code_is_right(check):
    found = list(check(CPU))
    assert found and all(error <= allowed for _, error, allowed in found), found


def test_the_check_of_fused_scores():
    assert not list(gpu_check.check_fused_scores(CPU))
    with interpreted_kernels():
        found = list(gpu_check.check_fused_scores(CPU, vocab=201))
    assert len(found) == 4 and all(error <= allowed for _, error, allowed in found), found


def test_checks_fail_where_it_is_not(monkeypatch):
    right = gpu_check.linear_cross_entropy
    monkeypatch.setattr(gpu_check, "linear_cross_entropy", lambda *given, **options: 1.1 * right(*given, **options))
    wrong = [what for what, error, allowed in HEADS(CPU) if error > allowed]
    assert wrong and all(what.startswith("linear_cross_entropy") for what in wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run benchmarks.gpu_check itself")
def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    assert gpu_check.main() == 0
    assert "nothing was run, and nothing is claimed" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
