"""The floor: right products in every layout, and the fastest layout chosen."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from benchmarks import matmul_floor as module
from benchmarks.matmul_floor import FILL, LIBRARIES, PRODUCTS, Floor, Layout
from trl_fast.ops.backends import load_extension
from trl_fast.ops.device import device_facts, simulated_device

N, H, V = 13, 8, 100
assert load_extension().ok
# What the counter leaves out.
UNCOUNTED = {
    torch.ops.aten.addmm_: lambda total, left, right, **_: mm_flop(left, right),
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: mm_flop(x, weight[::-1]),
    torch.ops.trl_fast.product: lambda left, right, *_, **__: mm_flop(left, right),
}


@pytest.fixture
def floor(monkeypatch):
    # Collecting garbage would take longer than everything else.
    monkeypatch.setattr("benchmarks.timing.gc.collect", lambda: 0)
    monkeypatch.setattr(module, "TILE_ROWS", 5)
    monkeypatch.setattr(module, "TILE_COLUMNS", (30, 64))
    monkeypatch.setattr(module, "workspace_of", lambda *_: 6 * V * 4)
    with simulated_device(replace(device_facts(torch.device("cpu")), own_products=True)):
        yield Floor(torch.randn(N, H), torch.randn(V, H), torch.float32)


def test_layouts_are_row_blocks_and_tiles_and_for_the_weight_both_ways(floor):
    shapes = ((6, V), (5, 30), (5, 64))
    assert set(floor.candidates("logits")) == {Layout(*shape, False, name) for shape in shapes for name in LIBRARIES}
    assert set(floor.candidates("grad_weight")) == {
        Layout(*shape, way, name) for shape in shapes for way in (False, True) for name in LIBRARIES
    }


def test_libraries_are_those_that_serve(floor):
    assert floor.libraries == ["ATen", "oneDNN", "ours"]
    with simulated_device(replace(device_facts(torch.device("cpu")), own_products=False)):
        assert floor.libraries == ["ATen", "oneDNN"]
    assert Floor(torch.randn(N, H), torch.randn(V, H), torch.float64).libraries == ["ATen"]


def test_every_layout_gives_the_product(floor, monkeypatch):
    # That of oneDNN is computed, and written nowhere.
    monkeypatch.setattr(Floor, "libraries", ["ATen", "ours"])
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
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        step()
    assert counter.get_total_flops() == len(PRODUCTS[mode]) * 2 * N * V * H


def test_the_fastest_layout_by_row_is_chosen_and_tried_once(floor, monkeypatch):
    monkeypatch.setattr(Floor, "libraries", ["ATen"])
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
