"""A device of some size whose memory is followed tensor by tensor, on the CPU: what a GPU's allocator would tell."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trl_fast.modeling.uncheckpointed_layers import DeviceMemory
from trl_fast.ops import device
from trl_fast.ops.device import device_facts


class SimulatedDevice(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within, while they live; `total`: how many there are."""

    def __init__(self, total: int = 1 << 40) -> None:
        super().__init__()
        self.total, self.live, self.peak = total, 0, 0
        self._seen: set[int] = set()

    def memory(self, _device: torch.device) -> DeviceMemory:
        """In the place of `uncheckpointed_layers.device_memory`."""
        return DeviceMemory(self.total - self.live, self.total, self.live, self.peak)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What an operator is given was there before.
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen and storage._cdata not in given:
                self._take(storage)
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _tensors(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def set_bf16_products(monkeypatch, fast: bool) -> None:
    """Lets this CPU count, for a test, as one that has fast products of bfloat16 numbers or has not."""
    cpu = torch.device("cpu")
    monkeypatch.setitem(device.simulated.facts, "cpu", replace(device_facts(cpu), multiplies_bf16=fast))


def multiply_as_plans_do(monkeypatch) -> None:
    """Lets this CPU multiply by ATen's library, for a test: a plan knows nothing of products of ours.

    Those need no float32 copies of 16-bit factors, so that a real step may take less than its plan.
    """
    cpu = torch.device("cpu")
    monkeypatch.setitem(device.simulated.facts, "cpu", replace(device_facts(cpu), own_products=False))
