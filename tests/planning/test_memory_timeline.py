"""From what was taken and given back when to levels, kinds and peaks."""

import pytest

from trl_fast.planning.memory_timeline import (
    ATTENTION,
    FORWARD_STAGE,
    GRADIENTS,
    HEAD,
    HEAD_STAGE,
    SAVED,
    WEIGHTS,
    WORKSPACE,
    Allocation,
    Timeline,
)

BACKWARD = "backward"
# Operators 11 to 20 are the forward pass, 21 to 25 the head, 26 to 40 the backward pass.
STAGES = ((FORWARD_STAGE, 11, 20), (HEAD_STAGE, 21, 25), (BACKWARD, 26, 40))


def timeline(*allocations):
    return Timeline.of(allocations, STAGES)


def test_memory_counts_from_the_operator_that_took_it_to_the_last_that_saw_it():
    found = timeline(Allocation(100, 12, FORWARD_STAGE, None, 14), Allocation(7, 14, FORWARD_STAGE, None, 15))
    assert found.levels.sum(axis=0)[:6].tolist() == [0, 100, 100, 107, 7, 0]


@pytest.mark.parametrize(
    "allocation, kind",
    [
        (Allocation(1, 2, None, WEIGHTS), WEIGHTS),
        (Allocation(1, 15, FORWARD_STAGE, None, 30), SAVED),
        (Allocation(1, 15, FORWARD_STAGE, ATTENTION, 30), SAVED),
        (Allocation(1, 15, FORWARD_STAGE, ATTENTION, 16), ATTENTION),
        (Allocation(1, 15, FORWARD_STAGE, None, 20), WORKSPACE),
        (Allocation(1, 22, HEAD_STAGE, None, 35), HEAD),
        (Allocation(1, 30, BACKWARD, None, 31), WORKSPACE),
        (Allocation(1, 30, BACKWARD, GRADIENTS), GRADIENTS),
    ],
)
def test_kinds(allocation, kind):
    (peak,) = {peak.bytes for peak in timeline(allocation).stage_peaks().values() if peak.bytes}
    assert peak == timeline(allocation).peak().parts[kind] == 1


def test_what_was_gone_before_the_step_does_not_count():
    found = timeline(Allocation(5, 1, None, WEIGHTS, 10), Allocation(3, 1, None, WEIGHTS))
    assert found.levels.max() == 3 and found.levels.shape[1] == 30


def test_peaks_by_stage():
    found = timeline(
        Allocation(10, 1, None, WEIGHTS),
        Allocation(4, 13, FORWARD_STAGE, None, 30),
        Allocation(20, 23, HEAD_STAGE, None, 24),
        Allocation(8, 28, BACKWARD, None, 29),
    )
    assert {name: peak.bytes for name, peak in found.stage_peaks().items()} == {
        FORWARD_STAGE: 14,
        HEAD_STAGE: 34,
        BACKWARD: 22,
    }
    peak = found.peak()
    assert peak.stage == HEAD_STAGE and peak.bytes == 34 and peak.operator == 12
    assert (peak.parts[WEIGHTS], peak.parts[SAVED], peak.parts[HEAD]) == (10, 4, 20)
