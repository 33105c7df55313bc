"""The means over several micro-batches that are logged."""

import math

import torch

from trl_fast.trainers.base.metric_buffer import MetricBuffer


def pairs(**values):
    return {name: (torch.tensor(float(total)), torch.tensor(float(count))) for name, (total, count) in values.items()}


def same(values):
    return values


def test_the_mean_of_the_means_of_micro_batches():
    buffer = MetricBuffer()
    for batch in (pairs(a=(6, 2), b=(1, 1)), pairs(a=(1, 1), b=(0, 0))):
        buffer.add(batch)
    assert buffer.pop(same) == {"a": 2.0, "b": 0.5}
    assert buffer.pop(same) == {}


def test_processes_are_summed_before_dividing_and_once():
    buffer, calls = MetricBuffer(), []

    def reduce(values):
        calls.append(values)
        return values + torch.tensor([[10.0, 1.0]])

    buffer.add(pairs(a=(2, 1), b=(4, 2)))
    assert buffer.pop(reduce) == {"a": 6.0, "b": 14 / 3}
    assert len(calls) == 1


def test_optional_names_are_means_over_the_micro_batches_that_have_them():
    buffer = MetricBuffer(optional={"good", "bad", "never"})
    for good, bad in (((0, 0), (2, 1)), ((8, 2), (0, 0)), ((0, 0), (4, 1))):
        buffer.add(pairs(loss=(1, 1), good=good, never=(0, 0), bad=bad))
    found = buffer.pop(same)
    assert found == {"loss": 1.0, "good": 4.0, "bad": 3.0}
    # In the order in which they first had a value, as TRL's.
    assert list(found) == ["loss", "bad", "good"]


def test_not_a_number_counts_unless_it_is_to_be_skipped():
    for skip_nan, expected in ((False, math.nan), (True, 3.0)):
        buffer = MetricBuffer(skip_nan=skip_nan)
        for value in (3.0, math.nan):
            buffer.add(pairs(a=(value, 1)))
        assert str(buffer.pop(same)["a"]) == str(expected)
    buffer = MetricBuffer(skip_nan=True)
    buffer.add(pairs(a=(math.nan, 1)))
    assert buffer.pop(same) == {"a": None}
