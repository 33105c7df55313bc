"""The sweep on tiny problems: which points run, what is kept, and what is made of the figures."""

import json

import pytest

from benchmarks import sweep, sweep_report
from benchmarks.head_problem import make_problem
from benchmarks.linear_logprob import BY_TOKEN, CHUNKED, FLOOR, MODES, PLAIN, TRL
from benchmarks.sweep import POINTS, Point

TINY = (Point(5, 16, 200), Point(9, 16, 200), Point(9, 16, 200, "fp32"))
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 8,
    "isa": "AVX2",
    "threads": 2,
    "torch": "2",
    "bf16_products": "fp",
}


def figure(mode, name, seconds, floor, mib):
    middle = sorted(seconds)[len(seconds) // 2]
    ratio = {"median": middle, "over_floor": middle / floor, "extra_bytes": mib << 20}
    return {"mode": mode, "name": name, "seconds": seconds} | ratio


def measured(point, *_):
    """Stands for the figures of `measure`."""
    figures = []
    for mode in MODES:
        figures.append(figure(mode, "ours, cpp", [2.2, 2.0, 2.5], 2.0, 30))
        figures.append(figure(mode, TRL, [11.0], 2.0, 400))
        figures.append(figure(mode, FLOOR, [1.9, 2.0, 2.1], 2.0, 0))
        figures.append({"mode": mode, "name": PLAIN, "not_run": "would take about 7 min"})
    return {**point._asdict(), "rounds": 3, "floor_layouts": {}, "figures": figures}


@pytest.fixture
def paths(monkeypatch, tmp_path):
    """(figures, document) of a sweep over TINY."""
    monkeypatch.setattr(sweep, "POINTS", TINY)
    # Collecting garbage would take longer than everything else.
    monkeypatch.setattr("benchmarks.timing.gc.collect", lambda: 0)
    document = tmp_path / "docs" / "benchmarks.md"
    document.parent.mkdir()
    document.write_text(f"before\n\n{sweep_report.BEGIN}\nold\n{sweep_report.END}\n\nafter\n")
    return tmp_path / "results" / "sweep.json", document


def run(monkeypatch, paths, *arguments):
    monkeypatch.setattr("sys.argv", ["sweep", "--json", str(paths[0]), "--docs", str(paths[1]), *arguments])
    return sweep.main()


def test_points_by_part_and_by_name():
    assert sweep.select_points([], POINTS) == list(POINTS)
    assert {point.dtype for point in sweep.select_points(["fp32"], POINTS)} == {"fp32"}
    assert sweep.select_points(["N8192"], POINTS) == [Point(8192, 896, 151936)]
    assert sweep.select_points(["N7-H8-V9-fp32", "N8192", "N8192"], POINTS) == [
        Point(7, 8, 9, "fp32"),
        Point(8192, 896, 151936),
    ]
    for word in ("N819", "N7-H8-V9-fp16", "N0-H8-V9-fp32"):
        with pytest.raises(ValueError, match=f"points: '{word}' is neither a full name"):
            sweep.select_points([word], POINTS)


def test_the_points_span_what_they_should_and_have_names():
    assert {min(p.rows for p in POINTS), max(p.rows for p in POINTS)} == {256, 8192}
    assert {min(p.hidden for p in POINTS), max(p.hidden for p in POINTS)} == {576, 4096}
    assert {min(p.vocab for p in POINTS), max(p.vocab for p in POINTS)} == {32768, 262144}
    assert all(Point.of_name(point.name) == point for point in (*POINTS, *sweep.QUICK_POINTS))


def test_what_does_not_fit_is_not_run_and_says_why(monkeypatch):
    problem = make_problem(4096, 16, 4096, sweep.DTYPES["fp32"], sweep.torch.device("cpu"))
    # The probe is 128 x 2048: one 64th of the whole.
    monkeypatch.setattr(sweep, "first_seconds", lambda run, device: 3.0)
    assert sweep.why_not(PLAIN, problem, "trained", limit=192.0) is None
    assert sweep.why_not(PLAIN, problem, "trained", limit=191.0) == "would take about 3 min"
    assert sweep.why_not(CHUNKED, problem, "trained", limit=60.0) == "would take about 3 min"
    assert sweep.why_not(TRL, problem, "scoring", limit=60.0) == "would take about 3 min"
    assert sweep.why_not(TRL, problem, "trained", limit=60.0) is None
    little = type("Memory", (), {"available": 1 << 28})
    monkeypatch.setattr(sweep.psutil, "virtual_memory", lambda: little)
    monkeypatch.setattr(sweep, "PLAIN_BYTES_A_LOGIT", 1 << 8)
    assert sweep.why_not(PLAIN, problem, "trained", limit=192.0) == "would need about 4 GiB"


def test_a_sweep_measures_writes_and_plots(monkeypatch, paths):
    assert run(monkeypatch, paths, "--rounds", "1") == 0
    results = json.loads(paths[0].read_text())
    assert list(results["points"]) == [point.name for point in TINY]
    for point in results["points"].values():
        assert set(point["floor_layouts"]) == {"logits", "grad_hidden", "grad_weight"}
        for mode in MODES:
            found = sweep_report.by_name(point, mode)
            assert set(found) == {"ours", TRL, PLAIN, FLOOR} | ({BY_TOKEN, CHUNKED} if mode == "trained" else set())
            assert all(f["median"] > 0 and f["over_floor"] > 0 for f in found.values())
    assert {path.suffix for path in paths[0].parent.iterdir()} == {".json", ".png"}
    assert "../results/sweep_floor.png" in paths[1].read_text()
    limit = ("--points", TINY[0].name, "--rounds", "1", "--limit", "1e-9")
    assert run(monkeypatch, paths, *limit) == 0
    point = json.loads(paths[0].read_text())["points"][TINY[0].name]
    assert {f["name"] for f in point["figures"] if "not_run" in f} == {TRL, PLAIN, CHUNKED}


def test_an_interrupted_sweep_keeps_what_it_has_and_resumes(monkeypatch, paths):
    ran = []

    def interrupted(point, *given):
        if point == TINY[1]:
            raise KeyboardInterrupt
        return measured(point)

    monkeypatch.setattr(sweep, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, paths)
    assert list(json.loads(paths[0].read_text())["points"]) == [TINY[0].name]

    monkeypatch.setattr(sweep, "measure", lambda point, *given: ran.append(point) or measured(point))
    assert run(monkeypatch, paths, "--resume") == 0
    assert ran == list(TINY[1:])
    assert set(json.loads(paths[0].read_text())["points"]) == {point.name for point in TINY}
    ran.clear()
    assert run(monkeypatch, paths, "--points", "fp32") == 0 and ran == [TINY[2]]
    assert len(json.loads(paths[0].read_text())["points"]) == len(TINY)
    ran.clear()
    assert run(monkeypatch, paths, "--report") == 0 and ran == []


def test_figures_of_another_machine_are_not_mixed_in(monkeypatch, paths, capsys):
    monkeypatch.setattr(sweep, "measure", measured)
    assert run(monkeypatch, paths) == 0
    monkeypatch.setattr(sweep, "describe_machine", lambda: MACHINE)
    assert run(monkeypatch, paths, "--resume") == 2
    assert "was measured with cpu=" in capsys.readouterr().out
    assert run(monkeypatch, paths) == 0
    assert json.loads(paths[0].read_text())["machine"] == MACHINE


def test_the_table_says_what_was_found_and_what_was_not(paths):
    results = {"machine": MACHINE, "points": {point.name: measured(point) for point in TINY}}
    for _ in range(2):
        sweep_report.write_docs(results, [paths[0].parent / "sweep_floor.png"], paths[1])
    text = paths[1].read_text()
    assert text.startswith(f"before\n\n{sweep_report.BEGIN}\nMachine: a CPU, 2 cores, 8 GiB; AVX2")
    assert text.endswith(f"![sweep_floor](../results/sweep_floor.png)\n{sweep_report.END}\n\nafter\n")
    row = (
        "| 9 | 16 | 200 | fp32 | 2.00 s (1.90–2.10) | 1.10 × floor, 2.20 s (2.00–2.50), 30 MiB "
        "| 5.00 × ours, 11.00 s (1 run), 400 MiB | not run: would take about 7 min |"
    )
    assert text.count(row) == len(MODES)


def test_a_document_without_markers_is_refused_before_anything_runs(monkeypatch, paths, capsys):
    monkeypatch.setattr(sweep, "measure", None)
    paths[1].write_text(f"{sweep_report.END} {sweep_report.BEGIN}")
    assert run(monkeypatch, paths) == 2
    assert "must have <!-- sweep -->" in capsys.readouterr().out
    assert not paths[0].exists()
