"""The GPU kit: its rehearsal, its checks in small, and that no failure loses the rest."""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.gpu_kit import __main__ as kit_main
from benchmarks.gpu_kit import correctness, divergences, float64_cases, watching
from benchmarks.gpu_kit.facts import Facts, default_path, read_facts
from benchmarks.gpu_kit.gpu_timing import Clock, Timed
from benchmarks.gpu_kit.phases import PLANS, Phase
from benchmarks.gpu_kit.summary import MOST_CHARACTERS, print_summary
from support.triton_interpreter import interpreted_kernels
from trl_fast.modeling.attention import block_masks, flex
from trl_fast.modeling.attention.row_attention import RowMask
from trl_fast.ops.pair_formulas import PAIR_FORMULAS

pytestmark = pytest.mark.gpu_code

CPU = torch.device("cpu")
HEADS = functools.partial(correctness.check_heads, CPU, rows=22, hidden=16, vocab=301)
LOSSES = functools.partial(correctness.check_losses, CPU, longest=200)


@pytest.mark.slow
def test_the_rehearsal(tmp_path, capsys):
    """Every phase runs to its end with stand-ins, finds nothing wrong, and says what it left out."""
    path = tmp_path / "facts.jsonl"
    assert kit_main.main(["--device", "cpu", "--tiny", "--facts", str(path), "--seconds", "300"]) == 0
    facts = read_facts(path)
    ended = {fact["phase"]: fact["how"] for fact in facts if fact["what"] == "phase"}
    assert ended == {phase.name: "done" for phase in PLANS["rehearsal"]}
    assert {phase.module for phase in PLANS["first"]} == {phase.module for phase in PLANS["rehearsal"]}
    assert not [fact for fact in facts if fact["what"].startswith("WRONG")]
    checked = {fact["what"]: fact["right"] for fact in facts if fact["what"].startswith("check ")}
    assert all(checked[f"check {name}"] > 0 for name in ("heads", "losses", "attention", "layouts", "divergences"))
    losses = {fact["phase"]: fact["losses"] for fact in facts if "losses" in fact}
    assert losses["step dpo trl_fast host"] == pytest.approx(losses["step dpo trl"], rel=1e-5)
    peaks = [fact for fact in facts if "predicted_bytes" in fact]
    assert peaks and peaks[0]["predicted_bytes"] > 0
    skipped = {fact["what"] for fact in facts if "skipped" in fact}
    assert "hardware counters" in skipped and "liger-kernel" in skipped
    printed = capsys.readouterr().out
    assert "left out: watching, hardware counters: ncu is not installed" in printed
    assert "check heads:" in printed and len(printed) < MOST_CHARACTERS + 2000


def test_divergences_are_checked(monkeypatch):
    """Every kind on the backends of this CPU, and a beta that is not asked for is found."""
    check = functools.partial(divergences.check_divergences, CPU, rows=9, hidden=16, vocab=301)
    found = list(check())
    assert len(found) % (3 * len(divergences.CASES)) == 0 and all(one.ok for one in found)
    right = divergences.linear_divergence
    monkeypatch.setattr(divergences, "linear_divergence", lambda *given, **more: right(*given, **more | {"beta": 0.2}))
    assert not any(one.ok for one in check() if "tvd" not in one.what)


def phases_of(*words):
    # The first one waits for a server of processes that imports torch; what hangs should not take long.
    return [Phase(word, "tests.support.kit_phases", 2 if word == "hang" else 30, 0, (word,)) for word in words]


@pytest.mark.slow
def test_a_phase_that_fails_costs_no_other(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    monkeypatch.setattr(kit_main, "GRACE", 0.5)
    monkeypatch.setattr(kit_main, "PRELOADED", [])
    arguments = kit_main.parse_arguments(["--device", "cpu", "--tiny", "--facts", str(path), "--seconds", "200"])
    kit_main.run_phases(phases_of("raise", "crash", "hang", "run"), arguments, Console(quiet=True))
    facts = read_facts(path)
    ended = {fact["phase"]: fact["how"] for fact in facts if "how" in fact}
    assert ended == {
        "raise": "failed with exit code 1",
        "crash": "failed with exit code 3",
        "hang": "ended by force at its deadline",
        "run": "done",
    }
    assert [fact["phase"] for fact in facts if fact["what"] == "begun"] == ["raise", "crash", "hang", "run"]
    assert [fact["phase"] for fact in facts if fact["what"] == "ended"] == ["run"]
    assert "RuntimeError: an illegal memory access" in [fact.get("skipped") for fact in facts]
    assert "Traceback" in path.with_suffix(".log").read_text()


def test_what_does_not_fit_the_time_is_said(tmp_path, monkeypatch):
    path = tmp_path / "facts.jsonl"
    monkeypatch.setattr(kit_main, "PRELOADED", [])
    arguments = kit_main.parse_arguments(["--facts", str(path), "--seconds", "5.1"])
    kit_main.run_phases([Phase("heads", "tests.support.kit_phases", 80, 12)], arguments, Console(quiet=True))
    (fact,) = read_facts(path)
    assert fact == {"phase": "heads", "what": "phase", "skipped": "0 s left, it needs 12"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_claimed(capsys, tmp_path):
    assert kit_main.main(["--facts", str(tmp_path / "facts.jsonl")]) == 0
    assert "nothing was run, and nothing is claimed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "3"], "--seconds 3: expected more than 5"),
        (["--device", "cpu"], "--device cpu: only a rehearsal, with --tiny"),
        (["--phases", "haeds"], "--phases haeds: unknown, expected some of ceilings, correctness"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        kit_main.parse_arguments(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "errors", "said"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0, "========= COMPUTE-SANITIZER"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, ""),
        (
            "========= COMPUTE-SANITIZER\n========= Invalid write\nat x\n========= ERROR SUMMARY: 3 errors",
            3,
            "Invalid",
        ),
        ("========= COMPUTE-SANITIZER\n========= Race\n========= RACECHECK SUMMARY: 2 hazards displayed", 2, "Race"),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", None, "not supported"),
        (
            "========= COMPUTE-SANITIZER\nTraceback\nValueError: no\n========= ERROR SUMMARY: 0 errors",
            0,
            "ValueError: no",
        ),
    ],
)
def test_what_a_checker_of_memory_says(printed, errors, said):
    found, words = watching.errors_in(printed)
    assert found == errors and said in words


@pytest.mark.parametrize(
    ("printed", "code", "fact"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"what": "check memcheck of layers", "right": 1, "wrong": 0}),
        ("a\n========= ERROR SUMMARY: 0 errors", 1, {"skipped": "the call ended with 1: a"}),
        ("========= Error: no device", 1, {"skipped": "the call ended with 1: ========= Error: no device"}),
        (
            "========= C\n========= Bad\n========= ERROR SUMMARY: 1 error",
            0,
            {"what": "WRONG memcheck of layers: ========= Bad"},
        ),
    ],
)
def test_a_checker_of_memory_sees_where_each_tensor_ends(printed, code, fact, tmp_path, monkeypatch):
    ran = []

    def run(command, env, **_):
        ran.append((command[:3], env["PYTORCH_NO_CUDA_MEMORY_CACHING"]))
        return subprocess.CompletedProcess(command, code, printed, "")

    monkeypatch.setattr(watching.shutil, "which", lambda name: name)
    monkeypatch.setattr(watching.subprocess, "run", run)
    facts = Facts(tmp_path / "facts.jsonl", "watching")
    kit = SimpleNamespace(is_gpu=True, device="cuda", seconds_left=9.0, facts=facts)
    watching.check(kit, "memcheck", "layers")
    assert ran == [(["compute-sanitizer", "--tool", "memcheck"], "1")]
    (found,) = read_facts(facts.path)
    assert found.items() >= fact.items()


@pytest.mark.parametrize("late", [False, True])
def test_a_phase_that_still_prepares_is_told_of_its_deadline(late, monkeypatch):
    """Preparing goes on in its turn, and takes of its time."""
    here, there = multiprocessing.Pipe()
    monkeypatch.setattr(kit_main.time, "monotonic", lambda: 1000.0)
    process = SimpleNamespace(join=lambda seconds=None: None, is_alive=lambda: late, kill=lambda: None, exitcode=0)
    assert kit_main.give_turn(kit_main.Running(process, here), 60.0).startswith("ended" if late else "done")
    assert there.recv() == 1060.0


def test_checks_are_in_phases_of_their_own():
    """Each check of a GPU is in one phase of every plan, so that none takes the time of all others."""
    every = set(correctness.checks(torch.device("cuda"), False, ()))
    for plan in PLANS.values():
        named = [name for phase in plan if phase.module == "correctness" for name in phase.arguments]
        assert sorted(named) == sorted(every)
    assert every >= correctness._COMPILED_AHEAD


def test_checks_whose_kernels_take_long_to_compile_are_prepared(monkeypatch):
    ran = []
    for name in vars(correctness).copy():
        if name.startswith("check_"):
            monkeypatch.setattr(correctness, name, lambda *_, name=name, **__: ran.append(name) or iter(()))
    for phase in PLANS["first"]:
        if phase.module == "correctness":
            correctness.prepare(torch.device("cuda"), False, phase.arguments)
            correctness.prepare(torch.device("cuda"), True, phase.arguments)
    assert ran == ["check_layers", "check_losses", "check_merged_attention", "check_flex_attention"]


# ---- checks


@pytest.mark.parametrize("check", [HEADS, LOSSES])
def test_checks_pass_where_the_code_is_right(check):
    found = list(check())
    assert found and [entry for entry in found if not entry.ok] == []


def test_the_cases_are_all_that_there_is_to_check():
    every = list(float64_cases.head_cases())
    for op in ("linear_logprob", "linear_token_loss", "linear_cross_entropy"):
        assert {case.mode for case in every if case.op == op} == set(float64_cases.MODES)
        assert any(case.bias and case.options.keys() >= {"softcap", "temperature"} for case in every if case.op == op)
    assert any(set(case.outputs) == set(float64_cases.EVERY_OUTPUT) for case in every)
    assert any("group_sizes" in case.options for case in every)
    losses = [case.what for case in float64_cases.loss_cases(CPU, longest=9)]
    assert {f"pair_loss, {name}" for name in PAIR_FORMULAS} <= set(losses)
    for term in ("clip", "cispo", "sapo"):
        assert f"policy_loss, {term}, off policy, KL" in losses


def test_the_check_of_fused_scores():
    assert not list(correctness.check_fused_scores(CPU))
    with interpreted_kernels():
        found = list(correctness.check_fused_scores(CPU, vocab=201, rows=20))
    assert len(found) == 16 and all(entry.ok for entry in found), found


def wrong_pairs(right):
    # The truth is the op's own PyTorch in float64.
    return right if right.losses.dtype == torch.float64 else right._replace(losses=1.01 * right.losses)


@pytest.mark.parametrize(
    ("op", "check", "wrong_for"),
    [
        ("linear_cross_entropy", HEADS, lambda right: 1.1 * right),
        ("linear_logprob", HEADS, lambda right: replace(right, logprobs=1.1 * right.logprobs)),
        ("pair_loss", LOSSES, wrong_pairs),
    ],
)
def test_checks_fail_where_it_is_not(op, check, wrong_for, monkeypatch):
    right = getattr(float64_cases, op)
    monkeypatch.setattr(float64_cases, op, lambda *given, **options: wrong_for(right(*given, **options)))
    wrong = [entry.what for entry in check() if not entry.ok]
    assert wrong and all(what.startswith(op) for what in wrong)


def test_wrongly_merged_attention_is_found(monkeypatch):
    right = correctness.merge_attention
    with interpreted_kernels():
        found = list(correctness.check_merged_attention(CPU, scale=1))
    assert len(found) == 2 * 15 and all(entry.ok for entry in found), found
    monkeypatch.setattr(correctness, "merge_attention", lambda *given, **way: [1.1 * x for x in right(*given, **way)])
    assert not any(entry.ok for entry in correctness.check_merged_attention(CPU, scale=1))


def test_wrong_attention_is_found(monkeypatch):
    right = correctness.attend
    assert all(entry.ok for entry in correctness.check_attention(CPU, scale=1))
    monkeypatch.setattr(correctness, "attend", lambda *given: 1.1 * right(*given))
    assert not any(entry.ok for entry in correctness.check_attention(CPU, scale=1))


@pytest.mark.parametrize(
    "wrong",
    ["nothing", *(pytest.param(what, marks=pytest.mark.slow) for what in ("numbers", "lengths"))],
)
def test_flex_attention_is_checked_with_its_compilations(wrong, monkeypatch):
    """Its code for a GPU, which is not there, by a backend that runs it as it is."""
    compiled = torch.compile(flex._attend, dynamic=False, fullgraph=True, backend="eager")
    right = flex.FlexAttention.attention
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex.FlexAttention, "supports", lambda *_: (True, ""))
    monkeypatch.setattr(correctness, "FLEX_CASES", (correctness.FlexCase((4, 2), 24, 16, torch.float32, 2.0),))
    rows = RowMask(((70, 20, 9),), runs=((3, 40),)), RowMask(((30, (12, 5, 4), 7), (3, 1)))
    monkeypatch.setattr(correctness, "FLEX_ROWS", rows)
    if wrong == "numbers":
        monkeypatch.setattr(flex.FlexAttention, "attention", lambda *given: (1.1 * right(*given)[0], None))
    if wrong == "lengths":
        monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", lambda *_: None)
    for forget in (block_masks.block_mask.cache_clear, torch._dynamo.reset):
        forget()
    failed = [entry.what for entry in correctness.check_flex_attention(CPU) if not entry.ok]
    for forget in (block_masks.block_mask.cache_clear, torch._dynamo.reset):
        forget()
    name = "FlexAttention, 4/2 heads of 24/16, float32, scores capped at 2, "
    again = [f"{name}{correctness.FLEX_ROWS[1]}: compiled once more"]
    assert len(failed) == 2 if wrong == "numbers" else failed == (again if wrong == "lengths" else []), failed


def test_what_raises_is_a_failed_check(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(float64_cases, "linear_cross_entropy", broken)
    found = [entry for entry in HEADS() if entry.what.startswith("linear_cross_entropy")]
    assert found and all(entry.error == float("inf") for entry in found)
    assert "RuntimeError: no kernel image is available" in found[0].what


def test_a_check_that_raises_ends_alone():
    def check():
        yield correctness.Checked("first", 0.0, 1.0)
        raise RuntimeError("the driver is gone")

    first, last = correctness.to_the_end("pairs", check)
    assert first.ok and last == ("pairs: RuntimeError: the driver is gone", float("inf"), 0.0)


# ---- facts, times, tables


def test_facts_are_on_disk_at_once_and_half_a_line_is_dropped(tmp_path, monkeypatch):
    path = tmp_path / "results" / "facts.jsonl"
    facts = Facts(path, "heads")
    facts.add("scoring: ours", ms=12.3456789, extra_bytes=5)
    facts.skip("scoring: Liger", torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has ..."))
    with path.open("a") as file:
        file.write('{"phase": "heads", "wh')
    assert read_facts(path) == [
        {"phase": "heads", "what": "scoring: ours", "ms": 12.346, "extra_bytes": 5},
        {"phase": "heads", "what": "scoring: Liger", "skipped": "OutOfMemoryError: CUDA out of memory."},
    ]
    assert read_facts(tmp_path / "none") == []
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert default_path() == tmp_path / "out" / "gpu_facts.jsonl"


def test_contenders_take_turns_at_being_first_and_one_that_raises_is_dropped():
    calls = []

    def broken():
        raise RuntimeError("out of memory")

    contenders = [Timed("a", lambda: calls.append("a")), Timed("b", broken), Timed("c", lambda: calls.append("c"))]
    Clock(CPU).race(contenders, rounds=3)
    assert calls == ["a"] * 3 + ["c"] * 3 + ["a", "c"] + ["c", "a"] + ["c", "a"]
    assert str(contenders[1].failure) == "out of memory" and contenders[1].median == float("inf")
    assert len(contenders[0].ms) == len(contenders[2].ms) == 3


def test_what_is_wrong_and_what_is_slow_can_be_read(capsys):
    facts = [
        {"phase": "heads", "what": f"token: {name}", "size": "8/4/2", "ms": ms}
        for name, ms in (("ours cuda", 50.0), ("TRL", 60.0), ("floor", 40.0))
    ]
    facts.append({"phase": "correctness", "what": "WRONG pair_loss, ipo, cuda: losses", "error": 0.2, "allowed": 1e-3})
    print_summary(Console(width=150), facts)
    printed = capsys.readouterr().out
    assert "50.0 (1.25; 1.20)" in printed
    assert "WRONG pair_loss, ipo, cuda: losses: 2.0e-01 > 1e-03" in printed
