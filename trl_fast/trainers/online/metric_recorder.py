"""Records numbers of an online method until the next log, the same ones in all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator

from trl_fast.data.device_transfer import copy_to_device

from ..base.metric_buffer import MetricBuffer


class MetricRecorder:
    """Records numbers that all processes share.

    Args:
        accelerator: gathers values of all processes.
        model: the policy, which is in training mode but for evaluation.
        buffers: collect the numbers of "train" and "eval".
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, buffers: Mapping[str, MetricBuffer]) -> None:
        self._accelerator, self._model, self._buffers = accelerator, model, buffers

    def record_values(self, values: Mapping[str, float] | Iterable[tuple[str, float]]) -> None:
        """Records numbers that are the same in all processes, as pairs where names come more than once.

        NaN takes no part in the mean that is logged.
        """
        device, pairs = self._accelerator.device, values.items() if isinstance(values, Mapping) else values
        self._record_scalars([(name, torch.full((), float(value), device=device)) for name, value in pairs])

    def record_extremes(self, values: Mapping[str, torch.Tensor]) -> None:
        """Records the least ("…_min") or the largest ("…_max") of values (B,) float32 of all processes, NaN aside."""
        found = []
        for name, own in values.items():
            every = self._accelerator.gather(own)
            unknown, sign = every.isnan(), -1 if name.endswith("_min") else 1
            extreme = sign * (sign * every).masked_fill(unknown, -torch.inf).amax()
            found.append((name, extreme.masked_fill(unknown.all(), torch.nan)))
        self._record_scalars(found)

    def record_statistics(self, name: str, values: torch.Tensor, statistics: tuple[str, ...]) -> None:
        """Records statistics ("min", "mean", "max") of values (M,) float32 of all processes; 0 of nothing.

        name: with {} where the statistic's name stands.
        """
        values = values if len(values) else torch.zeros(1)
        found = []
        for statistic in statistics:
            every = self._accelerator.gather(copy_to_device(getattr(values, statistic)(), self._accelerator.device))
            found.append((name.format(statistic), getattr(every, statistic)()))
        self._record_scalars(found)

    def _record_scalars(self, values: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Records numbers (0-d) that are on the device and stay there."""
        self._buffers["train" if self._model.training else "eval"].add(
            [(name, (value, torch.ones_like(value))) for name, value in values]
        )
