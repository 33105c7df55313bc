"""The benchmarks are there in a source tree only."""

import pytest

from trl_fast.cli import bench


def test_the_head_is_what_is_measured_unless_another_is_named(monkeypatch):
    calls = []
    monkeypatch.setattr(bench.runpy, "run_module", lambda name, **options: calls.append((name, bench.sys.argv)))
    monkeypatch.setattr(bench.sys, "path", list(bench.sys.path))
    monkeypatch.setattr(bench.sys, "argv", [])
    assert bench.prepare(["--quick"])() == 0
    assert bench.prepare(["sparse_gradient", "--rows", "8"])() == 0
    assert calls == [
        ("benchmarks.linear_logprob", ["linear_logprob", "--quick"]),
        ("benchmarks.sparse_gradient", ["sparse_gradient", "--rows", "8"]),
    ]


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="there is no benchmark 'swep'; did you mean 'sweep'"):
        bench.prepare(["swep"])
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(
        ValueError, match="come with the source tree.* run `make venv`, then `.venv/bin/trl-fast bench`"
    ):
        bench.prepare([])


def test_the_help_lists_the_benchmarks_and_what_each_does(capsys):
    assert bench.prepare(["--help"])() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"  linear_logprob", "  step", "  gpu_kit", "  roofline"} <= {*lines} and "  machine_info" not in lines
    assert lines[lines.index("  linear_logprob") + 1].startswith("      Times the loss head")
    assert max(map(len, lines)) <= 80
