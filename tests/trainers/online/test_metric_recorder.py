"""Metrics of generations and of micro-batches of their update: right, and read by nobody before they are logged."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.host_waits import host_waits
from trl_fast.trainers.base.metric_buffer import MetricBuffer
from trl_fast.trainers.online.metric_recorder import MetricRecorder

NAN = math.nan


class Recorder(MetricRecorder):
    """Records as a trainer's does, in one process on one device."""

    def __init__(self, device="cpu"):
        accelerator = SimpleNamespace(device=torch.device(device), gather=lambda tensor: tensor.reshape(-1))
        self.buffer = MetricBuffer(skip_nan=True)
        super().__init__(accelerator, torch.nn.Identity(), {"train": self.buffer})

    def read(self):
        return self.buffer.pop(lambda pairs: pairs)


EXTREMES = {
    "numbers": ([0.5, -2.0, 3.0], -2.0, 3.0),
    "some unknown": ([NAN, 1.5, NAN, 0.0], 0.0, 1.5),
    "infinite": ([NAN, math.inf, -math.inf], -math.inf, math.inf),
    "all unknown": ([NAN, NAN], None, None),
}


@pytest.mark.parametrize(("values", "least", "largest"), EXTREMES.values(), ids=EXTREMES.keys())
def test_extremes(values, least, largest):
    recorder = Recorder()
    recorder.record_extremes({"ratio_min": torch.tensor(values), "ratio_max": torch.tensor(values)})
    assert recorder.read() == {"ratio_min": least, "ratio_max": largest}


def test_extremes_of_micro_batches_without_any_take_no_part():
    recorder = Recorder()
    for values in ([NAN, NAN], [2.0, NAN], [4.0, 5.0]):
        recorder.record_extremes({"ratio_min": torch.tensor(values)})
    assert recorder.read() == {"ratio_min": 3.0}


def test_sampling():
    recorder = Recorder()
    recorder.record_statistics("sampling/difference/{}", torch.tensor([0.5, 1.0, 3.0]), ("min", "mean", "max"))
    recorder.record_statistics("sampling/nothing/{}", torch.zeros(0), ("max",))
    names = ("difference/min", "difference/mean", "difference/max", "nothing/max")
    assert recorder.read() == dict(zip((f"sampling/{name}" for name in names), (0.5, 1.5, 3.0, 0.0), strict=True))


def test_nothing_waits_until_it_is_read():
    with host_waits() as waits:
        recorder = Recorder("cuda")
        values = torch.zeros(4, device="cuda")
        waits.clear()
        recorder.record_extremes({"ratio_min": values, "ratio_max": values})
        recorder.record_statistics("sampling/difference/{}", torch.ones(3), ("mean", "max"))
        recorder.record_values({"num_tokens": 12})
        assert not waits.report()
