"""The checks of gpu_check in small, on the backends that this machine has; and that no failure loses the rest."""

from __future__ import annotations

import functools
import io
import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks import gpu_cases, gpu_check, linear_logprob
from benchmarks.timing import Contender
from support.triton_interpreter import interpreted_kernels
from trl_fast.ops.pair_formulas import PAIR_FORMULAS

CPU = torch.device("cpu")
HEADS = functools.partial(gpu_check.check_heads, rows=22, hidden=16, vocab=301)
SMALL = Namespace(rows=16, hidden=128, vocab=512, rounds=1, layout_tokens=16, layout_hidden=128)


@pytest.mark.parametrize(
    "check", [HEADS, gpu_check.check_losses, pytest.param(gpu_check.check_layouts, marks=pytest.mark.slow)]
)
def test_checks_pass_where_the_code_is_right(check):
    found = list(check(CPU))
    assert found and [entry for entry in found if not entry[1] <= entry[2]] == []


def test_the_cases_are_all_that_there_is_to_check():
    cases = list(gpu_cases.head_cases())
    for op in ("linear_logprob", "linear_token_loss", "linear_cross_entropy"):
        assert {case.mode for case in cases if case.op == op} == set(gpu_cases.MODES)
        assert any(case.bias and case.options.keys() >= {"softcap", "temperature"} for case in cases if case.op == op)
    assert any(set(case.outputs) == set(gpu_cases.EVERY_OUTPUT) for case in cases)
    assert any("group_sizes" in case.options for case in cases)
    assert any("head_grad" in case.options for case in cases)
    losses = [case.what for case in gpu_cases.loss_cases(CPU, longest=9)]
    assert {f"pair_loss, {name}" for name in PAIR_FORMULAS} <= set(losses)
    for term in ("clip", "cispo", "sapo"):
        assert f"policy_loss, {term}, off policy, KL" in losses


def test_the_check_of_fused_scores():
    assert not list(gpu_check.check_fused_scores(CPU))
    with interpreted_kernels():
        found = list(gpu_check.check_fused_scores(CPU, vocab=201))
    assert len(found) == 4 and all(error <= allowed for _, error, allowed in found), found


def wrong_pairs(right):
    # The truth is the op's own PyTorch in float64.
    return right if right.losses.dtype == torch.float64 else right._replace(losses=1.01 * right.losses)


@pytest.mark.parametrize(
    "op, check, wrong_for",
    [
        ("linear_cross_entropy", HEADS, lambda right: 1.1 * right),
        ("linear_logprob", HEADS, lambda right: replace(right, logprobs=1.1 * right.logprobs)),
        ("pair_loss", gpu_check.check_losses, wrong_pairs),
    ],
)
def test_checks_fail_where_it_is_not(op, check, wrong_for, monkeypatch):
    right = getattr(gpu_cases, op)
    monkeypatch.setattr(gpu_cases, op, lambda *given, **options: wrong_for(right(*given, **options)))
    wrong = [what for what, error, allowed in check(CPU) if error > allowed]
    assert wrong and all(what.startswith(op) for what in wrong)


def test_what_raises_is_a_failed_check(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_cases, "linear_cross_entropy", broken)
    found = [entry for entry in HEADS(CPU) if entry[0].startswith("linear_cross_entropy")]
    assert found and all(error == float("inf") for _, error, _ in found)
    assert "RuntimeError: no kernel image is available" in found[0][0]


def test_a_check_that_raises_ends_alone(monkeypatch):
    def check_nothing(device):
        yield "first", 0.0, 1.0
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(gpu_check, "CHECKS", (check_nothing, check_nothing))
    rows = gpu_check.run_checks(Console(quiet=True), CPU)
    assert [row["ok"] for row in rows] == [True, False] * 2
    assert rows[1]["what"] == "check_nothing: RuntimeError: an illegal memory access"


# ---- what is written down


def raising(error):
    def run():
        raise error

    return run


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "run_checks", lambda *_: [{"what": "all", "ok": True}])
    return tmp_path / "results" / "gpu_A_card"


def test_a_peer_that_raises_is_named_and_the_others_are_timed(results, monkeypatch):
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
    monkeypatch.setattr(linear_logprob, "trl", lambda _: raising(ImportError("No module named 'trl'")))
    monkeypatch.setattr(gpu_check, "liger", lambda _: Contender("Liger-Kernel", raising(out_of_memory)))
    console = Console(record=True, width=150, file=io.StringIO())
    assert gpu_check.check_and_race(console, SMALL, CPU, "A card")
    figures = json.loads(results.with_suffix(".json").read_text())
    assert figures["checks"] == [{"what": "all", "ok": True}]
    failures = {(row["mode"], row["name"]): row["not_run"] for row in figures["races"] if "not_run" in row}
    assert failures == {
        **{(mode, "TRL 1.16.0"): "ImportError: No module named 'trl'" for mode in linear_logprob.MODES},
        ("summed cross-entropy", "Liger-Kernel"): (
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
        ),
    }
    timed = {row["name"] for row in figures["races"] if "not_run" not in row}
    assert {"ours, torch", "ours", "plain PyTorch", "ours, packed", "ours, shared_prefix"} <= timed
    report = results.with_suffix(".md").read_text()
    assert "not run: ImportError: No module named 'trl'" in report and "not run: OutOfMemoryError" in report


def test_the_checks_are_on_disk_before_anything_is_timed(results, monkeypatch):
    def broken(*_):
        raise RuntimeError("the driver is gone")
        yield

    monkeypatch.setattr(gpu_check, "RACES", (broken,))
    with pytest.raises(RuntimeError, match="the driver is gone"):
        gpu_check.check_and_race(Console(record=True, quiet=True), SMALL, CPU, "A card")
    assert json.loads(results.with_suffix(".json").read_text())["checks"] == [{"what": "all", "ok": True}]


def test_something_of_ours_that_raises_is_a_failure(results, monkeypatch):
    def broken(console, arguments, device):
        yield [{"mode": "trained", "name": "ours, cuda", "not_run": "RuntimeError: illegal memory access"}]

    monkeypatch.setattr(gpu_check, "RACES", (broken,))
    assert not gpu_check.check_and_race(Console(record=True, quiet=True), SMALL, CPU, "A card")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run benchmarks.gpu_check itself")
def test_without_a_gpu_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    assert gpu_check.main() == 0
    assert "nothing was run, and nothing is claimed" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
