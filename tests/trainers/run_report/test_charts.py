"""Layout of the curves."""

import math

import pytest

from trl_fast.trainers.run_report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, make_charts, ticks

HISTORY = [
    {"step": 1, "loss": 2.0, "kl": 0.1, "epoch": 0.1},
    {"step": 2, "loss": math.nan, "kl": 0.1, "epoch": 0.2},
    {"step": 3, "loss": 1.0, "kl": 0.1, "epoch": 0.3},
    {"step": 3, "eval_loss": 1.5, "eval_runtime": 3.0},
    {"step": 5, "eval_loss": 1.2, "eval_runtime": 3.0, "once": 1.0},
    {"step": 5, "train_runtime": 9.0, "train_loss": 1.4, "total_flos": 1e9},
]


def test_curves_of_training_and_evaluation_share_a_chart():
    charts = make_charts(HISTORY, ("kl", "loss", "absent"))
    assert [chart.title for chart in charts] == ["kl", "loss"]
    training, evaluation = charts[1].lines
    assert [line.last for line in (training, evaluation)] == ["1", "1.2"]
    # Steps 1 to 5 and losses 1 to 2, NaN left out.
    assert training.points == f"{LEFT:.1f},{TOP:.1f} {LEFT + (WIDTH - LEFT - RIGHT) / 2:.1f},{HEIGHT - BOTTOM:.1f}"
    assert evaluation.is_evaluation and evaluation.points.endswith(f"{WIDTH - RIGHT:.1f},158.8")


def test_a_metric_that_never_changes_has_a_chart():
    (chart,) = make_charts([{"step": step, "kl": 0.0} for step in (1, 2)], ())
    assert [tick.text for tick in chart.up] == ["-1", "-0.5", "0", "0.5", "1"]


def test_long_curves_keep_their_last_point():
    (chart,) = make_charts([{"step": step, "loss": float(step)} for step in range(10_001)], ())
    points = chart.lines[0].points.split()
    assert len(points) <= 802 and points[-1] == f"{WIDTH - RIGHT:.1f},{TOP:.1f}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.64, 0.7, [0.64, 0.66, 0.68, 0.7]),
        (0, 1e-5, [0, 2.5e-6, 5e-6, 7.5e-6, 1e-5]),
        (-0.01, 0.08, [-0.025, 0, 0.025, 0.05, 0.075, 0.1]),
        (1e12, 3e12, [1e12, 1.5e12, 2e12, 2.5e12, 3e12]),
    ],
)
def test_ticks_are_round_and_hold_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)
