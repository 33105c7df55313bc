"""Layers that a GPU leaves uncheckpointed: what the plan says of them, against simulated steps that leave them so."""

import pytest

from support.models import tiny_config
from trl_fast.modeling.selective_checkpointing import SelectiveCheckpointing
from trl_fast.modeling.uncheckpointed_layers import MARGIN
from trl_fast.planning.memory_timeline import (
    EMBEDDING_STAGE,
    FORWARD_STAGE,
    HEAD_STAGE,
    KINDS,
    LAST_LAYER,
    MIDDLE_LAYERS,
    OPTIMIZER_STAGE,
    SAVED,
    highest,
)
from trl_fast.planning.peak_estimates import stage_peaks, whole_layers
from trl_fast.planning.simulated_step import simulate
from trl_fast.planning.training_setup import TRL, TrainingSetup

pytestmark = pytest.mark.plans

DEPTH, LENGTH = 5, 96
LAST_TWO = slice(3, 5)


def setup_of(**changes):
    return TrainingSetup(tiny_config("llama", num_hidden_layers=DEPTH), **changes)


def without_optimizer(peaks):
    return highest({name: peak for name, peak in peaks.items() if name not in (EMBEDDING_STAGE, OPTIMIZER_STAGE)})


def simulated(setup, monkeypatch, chosen):
    """A step that leaves the chosen layers of each pass uncheckpointed."""
    share_out = SelectiveCheckpointing._share

    def forced(self, layers, whole, limit):
        share_out(self, layers, whole, limit)
        self.whole = frozenset(layers[chosen])

    with monkeypatch.context() as patched:
        patched.setattr(SelectiveCheckpointing, "_share", forced)
        return simulate(setup, LENGTH)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "sft"},
        pytest.param({"lora_r": 4}, marks=pytest.mark.slow),
        pytest.param({"dtype": "float32", "method": "reward"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_layers_that_fit_a_gpu_do_fit_it(changes, monkeypatch):
    setup = setup_of(**changes)
    needed = without_optimizer(stage_peaks(setup, LENGTH)).bytes
    one = -(-whole_layers(setup, LENGTH, 1 << 40)[1] // DEPTH)
    limit = -(-(needed + int(2.5 * one)) * MARGIN // (MARGIN - 1))
    whole, size = whole_layers(setup, LENGTH, limit)
    assert whole == 2 and size == 2 * one
    saved = []
    for chosen in (LAST_TWO, slice(0)):
        step = simulated(setup, monkeypatch, chosen)
        assert without_optimizer(step.stage_peaks()).bytes <= limit - limit // MARGIN
        saved.append(step.at_start(LAST_LAYER)[KINDS.index(SAVED)])
    # They do save what was said.
    assert saved[0] - saved[1] == pytest.approx(size, rel=0.02)


def test_the_last_layers_cost_less_than_the_first(monkeypatch):
    setup = setup_of(method="sft", dtype="float32")
    last, first = (simulated(setup, monkeypatch, chosen).stage_peaks() for chosen in (LAST_TWO, slice(0, 2)))
    assert last[HEAD_STAGE].bytes == first[HEAD_STAGE].bytes
    for name in (LAST_LAYER, MIDDLE_LAYERS):
        assert last[name].bytes < first[name].bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"activation_offloading": True},
        {"activation_budget_bytes": 0},
        {"device": "cpu"},
        {"system": TRL},
    ],
    ids=str,
)
def test_setups_that_leave_none(changes):
    setup = setup_of(**changes)
    assert not setup.leaves_whole_layers
    assert whole_layers(setup, LENGTH, 1 << 40) == (0, 0)


@pytest.mark.slow
def test_a_budget_bounds_them_and_what_a_step_needs_does_not_know_of_it():
    setup = setup_of(method="sft")
    _, size = whole_layers(setup, LENGTH, 1 << 40)
    bounded = setup.but(activation_budget_bytes=size // 2)
    assert whole_layers(bounded, LENGTH, 1 << 40)[0] == DEPTH // 2
    plain = simulate(setup.but(activation_budget_bytes=0), LENGTH).stage_peaks()
    for one in (setup, bounded):
        peaks = simulate(one, LENGTH).stage_peaks()
        assert [peaks[name].bytes for name in (FORWARD_STAGE, HEAD_STAGE)] == [
            plain[name].bytes for name in (FORWARD_STAGE, HEAD_STAGE)
        ]
