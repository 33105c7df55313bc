"""The host's time for a layer: the ways that are timed checkpoint what they say."""

import pytest

from benchmarks.checkpointing import NONE, PLAIN, RESULTS, contenders, layer_milliseconds, make_parser
from trl_fast.modeling.selective_checkpointing import SelectiveCheckpointing

TINY = ["--layers", "4", "--hidden", "16", "--tokens", "4", "--steps", "2", "--rounds", "1"]


def test_each_way_leaves_the_layers_whole_that_it_says(monkeypatch):
    whole = []
    share_out = SelectiveCheckpointing._share

    def seen(self, layers, count, limit):
        whole.append((count, limit > 0))
        share_out(self, layers, count, limit)

    monkeypatch.setattr(SelectiveCheckpointing, "_share", seen)
    found = {}
    for way in contenders(make_parser().parse_args(TINY)):
        whole.clear()
        way.run()
        found[way.name] = list(whole)
    assert found == {
        NONE: [],
        PLAIN: [],
        "all layers left whole": [(0, False), (4, False)],
        "half of them": [(0, False), (2, False)],
        "none of them": [(0, False), (0, False)],
        RESULTS: [(0, True), (0, True)],
    }


@pytest.mark.slow
def test_a_small_layer_takes_the_host_no_longer_than_plain_checkpointing():
    found = layer_milliseconds(make_parser().parse_args([]))
    assert found["all layers left whole"] < 0.8 * found[PLAIN]
    assert found["none of them"] < 1.1 * found[PLAIN]
