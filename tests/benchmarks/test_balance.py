"""The count of waiting processes: the same each time, and never worse with rows dealt by their cost."""

import numpy as np
import pytest

from benchmarks.balance import KINDS, count, main, slowest_over_mean


@pytest.mark.parametrize("kind", KINDS)
def test_rows_dealt_by_cost_wait_less(kind):
    found = count(kind, 8, 4, 2, steps=5)
    assert found == count(kind, 8, 4, 2, steps=5)
    assert found["never"] > found["micro_batch"] > found["step"] >= 1


def test_waiting_is_for_the_slowest_process_of_each_micro_batch():
    assert slowest_over_mean(np.array([[[4, 2], [1, 5]]])) == (4 + 5) / (3 + 3)


def test_the_table_has_a_line_for_each(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["balance", "--ranks", "2", "--steps", "1"])
    main()
    assert capsys.readouterr().out.count("| SFT, help pages ") == 3
