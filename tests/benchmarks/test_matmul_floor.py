"""The floor: right products in every layout, and the fastest layout chosen."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from benchmarks import matmul_floor as module
from benchmarks.matmul_floor import FILL, PRODUCTS, Floor, Layout

N, H, V = 13, 8, 100
# What the counter leaves out.
IN_PLACE = {torch.ops.aten.addmm_: lambda total, left, right, **_: mm_flop(left, right)}


@pytest.fixture
def floor(monkeypatch):
    # Collecting garbage would take longer than everything else.
    monkeypatch.setattr("benchmarks.timing.gc.collect", lambda: 0)
    monkeypatch.setattr(module, "TILE_ROWS", 5)
    monkeypatch.setattr(module, "TILE_COLUMNS", (30, 64))
    monkeypatch.setattr(module, "workspace_of", lambda *_: 6 * V * 4)
    return Floor(torch.randn(N, H), torch.randn(V, H), torch.float32)


def test_layouts_are_row_blocks_and_tiles_and_for_the_weight_both_ways(floor):
    assert floor.candidates("logits") == [Layout(6, V), Layout(5, 30), Layout(5, 64)]
    assert set(floor.candidates("grad_weight")) == {
        Layout(rows, columns, way) for rows, columns in ((6, V), (5, 30), (5, 64)) for way in (False, True)
    }


def test_every_layout_gives_the_product(floor):
    logits = torch.full((N, V), FILL)
    for layout in floor.candidates("grad_hidden"):
        floor.logits.fill_(FILL)
        floor.multiply("grad_hidden", layout, N)
        torch.testing.assert_close(floor.grad_hidden, logits @ floor.weight)
    for layout in floor.candidates("grad_weight"):
        floor.logits.fill_(FILL)
        floor.multiply("grad_weight", layout, N)
        got = floor.grad_weight.view(H, V).t() if layout.transposed else floor.grad_weight
        torch.testing.assert_close(got, logits.t() @ floor.hidden)
    for layout in floor.candidates("logits"):
        floor.multiply("logits", layout, N)
        # The buffer holds the last block.
        rows, columns = N % layout.rows, V % layout.columns or V
        exact = floor.hidden[-rows:] @ floor.weight[-columns:].t()
        torch.testing.assert_close(floor.logits[: rows * columns].view(rows, columns), exact)


@pytest.mark.parametrize("mode", PRODUCTS)
def test_a_mode_runs_its_products_and_no_more(floor, mode):
    step = floor.step(mode)
    assert set(floor.tried) == set(PRODUCTS[mode])
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    assert counter.get_total_flops() == len(PRODUCTS[mode]) * 2 * N * V * H


def test_the_fastest_layout_by_row_is_chosen_and_tried_once(floor, monkeypatch):
    # A block of 6 rows in 6 seconds is slower than one of 5 in 5.1 would be, were rows not counted.
    seconds = {Layout(6, V): 6.0, Layout(5, 30): 5.1, Layout(5, 64): 7.0}
    tries = []

    def clock(run, device):
        tries.append(run.args[1])
        return seconds[run.args[1]]

    monkeypatch.setattr(module, "first_seconds", clock)
    assert floor.best("logits") == floor.best("logits") == Layout(6, V)
    assert tries == list(seconds)
    assert floor.tried["logits"][Layout(6, V)] == pytest.approx(N)
